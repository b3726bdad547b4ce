"use strict";
// One stream tells the page when to look again; htmx fetches the panels that listen.
const stream = new EventSource("/events");
for (const kind of ["changed", "progress"]) {
  stream.addEventListener(kind, () => document.body.dispatchEvent(new CustomEvent(kind)));
}
// What looks as before is left alone, and with it the keyboard's place, what is open, and a press that has begun.
const shown = new Map([...document.querySelectorAll("section[hx-get]")].map((panel) => [panel, panel.innerHTML]));
document.body.addEventListener("htmx:beforeSwap", (event) => {
  const { target, serverResponse } = event.detail;
  if (!shown.has(target)) return;
  const fresh = document.createElement("template");
  fresh.innerHTML = serverResponse; // to be written as the browser writes it
  if (shown.get(target) === fresh.innerHTML) {
    event.detail.shouldSwap = false;
    for (const box of target.querySelectorAll("input[type=checkbox]")) box.checked = box.defaultChecked;
  }
  shown.set(target, fresh.innerHTML);
});
function complain(said, problem) {
  const words = document.createElement("span");
  words.className = "bad";
  words.textContent = problem;
  said.replaceChildren(words);
}
document.getElementById("file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  const said = document.getElementById("said-add");
  if (!file) return;
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    document.getElementById("facts").value = text;
    said.textContent = `${file.name} is above; Add takes its facts`;
  } catch (error) {
    complain(said, `${file.name}: ${error instanceof TypeError ? "not UTF-8 text; save it as UTF-8" : error.message}`);
  }
  event.target.value = ""; // the same file, mended, is chosen again
});
document.body.addEventListener("htmx:afterRequest", (event) => {
  const form = event.target.closest("form");
  if (form && event.detail.successful && event.target === form && !form.querySelector(".said .bad")) {
    for (const name of ["facts", "target"]) {
      if (form.elements[name] && form.elements[name].type !== "hidden") form.elements[name].value = "";
    }
  }
});
document.body.addEventListener("htmx:responseError", (event) => {
  const { target, xhr } = event.detail;
  if (!target.classList.contains("said")) return;
  complain(target, xhr.responseText);
});
