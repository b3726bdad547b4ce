"use strict";
// One stream tells the page when to look again; htmx fetches the panels that listen.
const stream = new EventSource("/events");
for (const kind of ["changed", "progress"]) {
  stream.addEventListener(kind, () => document.body.dispatchEvent(new CustomEvent(kind)));
}
// What looks as before is left alone, and with it the keyboard's place, what is open, and a press that is under way.
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
document.getElementById("file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (file) document.getElementById("facts").value = await file.text();
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
  const said = document.createElement("span");
  said.className = "bad";
  said.textContent = xhr.responseText;
  target.replaceChildren(said);
});
