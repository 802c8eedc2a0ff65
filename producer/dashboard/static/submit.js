"use strict";
// Sends the chosen file to the API: first to be looked at, then to be submitted as it was looked at. The farm reads it,
// this page reads nothing of it. Whatever changes in the form asks for another look.

const KINDS = {
  csv: "text/csv",
  xlsx: "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
  jsonl: "application/x-ndjson",
  ndjson: "application/x-ndjson",
};
const api = document.querySelector("main").dataset.api;
const form = document.getElementById("manifest");
const answer = document.getElementById("answer");
const drop = document.getElementById("drop");
const field = (id) => document.getElementById(id);
let key = null;  // of what was looked at: handing it in twice is once

function element(tag, text, ...children) {
  const made = document.createElement(tag);
  if (text !== null) made.textContent = text;  // never HTML: it is strangers' text
  made.append(...children);
  return made;
}

function show(...children) {
  answer.replaceChildren(...children);
  answer.hidden = false;
}

// Whether it can be handed in, and beside the button for what it still waits.
function allow(missing) {
  field("submit").disabled = Boolean(missing);
  field("missing").textContent = missing;
}

function lines(id) {
  return field(id).value.split("\n").map((line) => line.trim()).filter(Boolean);
}

function query() {
  const asked = new URLSearchParams();
  for (const id of ["template", "file_name"]) if (field(id).value.trim()) asked.set(id, field(id).value.trim());
  for (const id of ["vary", "default"]) for (const line of lines(id)) asked.append(id, line);
  for (const id of ["partial", "deduplicate"]) if (field(id).checked) asked.set(id, "true");
  return asked;
}

async function send(path, asked, headers) {
  const file = field("file").files[0];
  const type = KINDS[file.name.split(".").pop().toLowerCase()];
  if (!type) throw new Error(`${file.name} is neither .xlsx nor .csv nor .jsonl`);
  let response;
  try {
    response = await fetch(`${api}${path}?${asked}`, { method: "POST", body: file, headers: { "Content-Type": type, ...headers } });
  } catch {
    throw new Error("the farm does not answer, or the file has changed on the disk: choose it again");
  }
  if (response.status === 401) location.reload();  // the key has ended: the page leads to the form
  const body = await response.json();
  if (!response.ok) throw Object.assign(new Error(body.detail || body.title), { faults: body.errors || [] });
  return body;
}

function told(fault) {
  const place = [fault.line ? `line ${fault.line}` : "", fault.field].filter(Boolean).join(", ");
  return place ? `${place}: ${fault.message}` : fault.message;
}

function list(faults) {
  return element("ul", null, ...faults.map((fault) => element("li", told(fault))));
}

function wrong(error) {
  const alert = element("p", error.message);
  alert.setAttribute("role", "alert");
  show(element("h2", "Nothing was handed in"), alert, list(error.faults || []));
}

function cost(estimate) {
  const hours = estimate.gpu_s >= 3600 ? `${(estimate.gpu_s / 3600).toFixed(1)} GPU-hours` : `${Math.ceil(estimate.gpu_s)} GPU-seconds`;
  const end = estimate.finishes_at ? `done by ${new Date(estimate.finishes_at).toLocaleString()}` : "not in a hundred years";
  const by = estimate.by === "measured" ? "as measured by the workers that live" : `by arithmetic, for ${estimate.assumed}`;
  return `${hours}; ${end}, ${by}`;
}

function table(rows) {
  const head = ["line", "prompt", "size", "steps", "seed", "name"];
  const cells = (row) => [row.line, row.prompt, `${row.width}×${row.height}`, row.steps, row.seed ?? "", row.name ?? ""];
  return element("table", null,
    element("thead", null, element("tr", null, ...head.map((name) => element("th", name)))),
    element("tbody", null, ...rows.map((row) => element("tr", null, ...cells(row).map((cell) => element("td", cell))))));
}

function refusal(preview) {
  if (!preview.jobs) return "No row is good: mend the file, and look at it again.";
  if (!preview.rejected || field("partial").checked) return "";
  return "Some rows are bad: mend them, or tick that the good rows are handed in; then look at it again.";
}

async function look() {
  const preview = await send("/manifests/preview", query());
  const count = `${preview.jobs} ${preview.jobs === 1 ? "image" : "images"}`;
  const bad = preview.rejected ? `, and ${preview.rejected} bad ${preview.rejected === 1 ? "row" : "rows"}` : "";
  const parts = [element("h2", `${count}${bad}`), element("p", cost(preview.estimate))];
  if (preview.separator && preview.separator !== ",") parts.push(element("p", `The first row says that a ${preview.separator === ";" ? "semicolon" : "tab"} separates the cells.`));
  if (preview.short_rows) parts.push(element("p", `Rows shorter than the header, their last cells taken as empty: ${preview.short_rows}`));
  if (preview.carried.length) parts.push(element("p", `Only carried along into the results: ${preview.carried.join(", ")}`));
  if (preview.problems.length) parts.push(list(preview.problems));
  if (preview.problem_count > preview.problems.length) parts.push(element("p", `… and ${preview.problem_count - preview.problems.length} more`));
  parts.push(table(preview.rows));
  if (preview.jobs > preview.rows.length) parts.push(element("p", `… and ${preview.jobs - preview.rows.length} more`));
  show(...parts);
  key = crypto.getRandomValues(new Uint32Array(4)).join("-");
  allow(refusal(preview));
}

async function handIn() {
  const asked = query();
  asked.set("name", field("name").value);
  const batch = await send("/batches", asked, { "Idempotency-Key": key });
  const link = element("a", batch.name);
  link.href = `${api}/batches/${batch.id}`;
  const rejected = batch.rejected ? `, bad rows left out: ${batch.rejected}` : "";
  const there = field("deduplicate").checked ? `, there already: ${batch.counts.succeeded}` : "";
  const farm = element("a", "See it being drawn");
  farm.href = "/";
  show(element("h2", "Handed in"), element("p", `${batch.jobs} images${rejected}${there}: `, link), element("p", null, farm));
  answer.dataset.batch = batch.id;
  allow("It is handed in. To hand it in once more, look at it again.");
}

async function busy(act) {
  field("look").disabled = true;
  allow("The farm reads the file …");
  show(element("p", "the farm reads the file …"));
  try {
    await act();
  } catch (error) {
    wrong(error);
    allow("Mend what is wrong, and look at it again.");
  } finally {
    field("look").disabled = false;
  }
}

function changed() {
  const missing = !field("file").files.length ? "choose a file" : !field("name").value.trim() ? "give the batch a name" : "look at it first";
  allow(`To hand it in, ${missing}.`);
}

function chosen() {
  const file = field("file").files[0];
  if (file && !field("name").value) field("name").value = file.name.replace(/\.[^.]+$/, "");
  changed();
}

changed();  // a browser that goes back keeps what was filled in
form.addEventListener("submit", (event) => { event.preventDefault(); busy(look); });
field("submit").addEventListener("click", () => { if (form.reportValidity()) busy(handIn); });
form.addEventListener("input", changed);
field("file").addEventListener("change", chosen);
for (const kind of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind !== "drop" || !event.dataTransfer.files.length) return;
    field("file").files = event.dataTransfer.files;
    chosen();
  });
}
