"""One process per device: takes messages, claims jobs, draws them with the engine, uploads and records the images."""
