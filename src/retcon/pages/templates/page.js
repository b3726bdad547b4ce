for (const part of document.querySelectorAll(".facts")) {
  const body = part.querySelector("tbody"), picks = [...part.querySelectorAll("select")];
  let show = "all";
  const chosen = () => picks.map((pick) => pick.value).filter((side) => side !== "");
  const is = (row, what, sides) => {
    if (what === "all") return true;
    if (what === "differ") return new Set(sides.map((side) => row.dataset["passed" + side])).size > 1;
    return row.dataset[what].split(" ").some((side) => sides.includes(side));
  };
  const look = () => {
    const sides = picks.length ? chosen() : ["0"];
    for (const cell of part.querySelectorAll("[data-side]")) cell.hidden = !sides.includes(cell.dataset.side);
    for (const row of body.rows) row.hidden = !is(row, show, sides);
    for (const button of part.querySelectorAll("[data-show]")) {
      const n = [...body.rows].filter((row) => is(row, button.dataset.show, sides)).length;
      button.querySelector("b").textContent = n.toLocaleString("en");
      button.setAttribute("aria-pressed", button.dataset.show === show);
    }
  };
  for (const button of part.querySelectorAll("[data-show]"))
    button.addEventListener("click", () => { show = button.dataset.show; look(); });
  for (const pick of picks) pick.addEventListener("change", look);
  for (const button of part.querySelectorAll("[data-sort]")) button.addEventListener("click", () => {
    const head = button.closest("th"), n = Number(button.dataset.sort), up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of part.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[n].dataset.value ?? row.cells[n].textContent;
    const number = "value" in (body.rows[0]?.cells[n].dataset ?? {});
    const order = number ? (a, b) => value(a) - value(b) : (a, b) => value(a).localeCompare(value(b), undefined, { numeric: true });
    const rows = [...body.rows].sort(order);
    body.append(...(up ? rows : rows.reverse()));
  });
  part.querySelector(".tools").hidden = false;
  look();
}
