"use strict";
/* Tables: a click on a head sorts; what a row does not know stays at the end. */
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column];
    const given = cell.dataset.v;
    if (given === undefined) return cell.textContent.trim().toLowerCase();
    return given === "" || given === "nan" ? null : Number(given);
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const numbers = body.rows[0] && body.rows[0].cells[column].dataset.v !== undefined;
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : numbers;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => [row, value(row, column)]);
      rows.sort(([, a], [, b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
        return down ? -order : order;
      });
      body.append(...rows.map(([row]) => row));
    });
  });
}
/* Filters: text anywhere in the row, and one of the actions. */
for (const controls of document.querySelectorAll("[data-filters]")) {
  const rows = [...document.getElementById(controls.dataset.filters).tBodies[0].rows];
  const words = controls.querySelector("input[type=search]");
  const kind = controls.querySelector("select");
  const count = controls.querySelector("output");
  const show = () => {
    const wanted = words.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = (!kind || !kind.value || row.dataset.kind === kind.value)
        && row.textContent.toLowerCase().includes(wanted);
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length} shown`;
  };
  words.addEventListener("input", show);
  if (kind) kind.addEventListener("change", show);
  show();
}
