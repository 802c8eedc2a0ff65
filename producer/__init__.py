"""The producer side: doors to the farm, and the language both sides speak. Never reaches torch."""
