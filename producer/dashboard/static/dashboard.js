"use strict";
// Asks for the overview every two seconds and swaps it in. When that fails, what was last seen stays, marked as old.

const PERIOD_MS = 2000;
const PERIOD_HIDDEN_MS = 30000;
const PATIENCE_MS = 8000;

const overview = document.getElementById("overview");
const freshness = document.getElementById("freshness");
let seenAt = overview.dataset.drawn === "yes" ? Date.now() : null;
let reachable = seenAt !== null;
let timer = null;

function span(ms) {
  const seconds = Math.round(ms / 1000);
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function say() {
  const seen = seenAt === null ? "never seen" : `last update ${span(Date.now() - seenAt)} ago`;
  const text = reachable ? "live" : `farm unreachable · ${seen}`;
  if (freshness.textContent !== text) freshness.textContent = text;
  document.body.classList.toggle("stale", !reachable);
}

// A picture that is shown already is kept, so that it neither flickers nor loads again.
function swap(html) {
  const fresh = new DOMParser().parseFromString(`<main>${html}</main>`, "text/html").querySelector("main");
  const shown = new Map();
  for (const image of overview.querySelectorAll(".picture img")) {
    const src = image.getAttribute("src");
    shown.set(src, [...(shown.get(src) || []), image]);
  }
  for (const image of fresh.querySelectorAll(".picture img")) {
    const same = (shown.get(image.getAttribute("src")) || []).shift();
    if (same) image.replaceWith(same);
  }
  overview.replaceChildren(...fresh.childNodes);
}

async function refresh() {
  clearTimeout(timer);
  try {
    const response = await fetch("/overview", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (response.status === 401) return location.reload();  // the key has ended: the page leads to the form
    if (!response.ok) throw new Error(`status ${response.status}`);
    swap(await response.text());
    seenAt = Date.now();
    reachable = true;
  } catch {
    reachable = false;
  }
  say();
  timer = setTimeout(refresh, document.hidden ? PERIOD_HIDDEN_MS : PERIOD_MS);
}

setInterval(say, 1000);
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
timer = setTimeout(refresh, PERIOD_MS);
