// Sorting for tables that ask for it, and folded parts opened for print. The page is complete without this.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((th, column) => {
    if (th.classList.contains("graphic")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...th.childNodes);
    th.append(button);
    th.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = th.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
      th.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => {
        const cell = row.cells[column];
        if (!cell) return ""; // a cell that says why nothing was measured stands for the rest
        return "value" in cell.dataset ? cell.dataset.value : cell.textContent.trim();
      };
      for (const body of table.tBodies) {
        const group = [...body.rows].filter((row) => row.className === "group");
        const rows = [...body.rows].filter((row) => row.className !== "group");
        rows.sort((a, b) => {
          const x = value(a), y = value(b);
          if (x === "" || y === "") return (x === "") - (y === ""); // what was not measured stays last either way
          const difference = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
          return down ? -difference : difference;
        });
        body.append(...group, ...rows);
      }
    });
  });
}
const folded = () => [...document.querySelectorAll("details:not([open]):not(.long)")];
let opened = [];
addEventListener("beforeprint", () => { opened = folded(); opened.forEach((d) => (d.open = true)); });
addEventListener("afterprint", () => { opened.forEach((d) => (d.open = false)); opened = []; });
