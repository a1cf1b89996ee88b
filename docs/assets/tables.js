// A click on the head of a table's column sorts its rows; a second one turns the order around. An option is one word,
// and a picture says below what it shows.
(() => {
  // the first number of a cell ("82.6 ± 1.4", "9,327 (2,091 of masks)", "-.029"), else its text
  const value = (cell) => {
    const text = cell.textContent.trim();
    const found = text.replace(/,(?=\d{3})/g, "").replace(/−/g, "-").match(/^[^\w.+-]*([+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)/i);
    return found ? Number(found[1]) : text;
  };
  const compare = (a, b) => {
    const kinds = [a, b].map((one) => (typeof one === "number" ? 0 : 1));
    if (kinds[0] !== kinds[1]) return kinds[0] - kinds[1]; // numbers before texts
    return kinds[0] ? a.localeCompare(b) : a - b;
  };
  const sort = (head) => {
    const column = head.cellIndex;
    const body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const empty = (row) => ["", "-"].includes(row.cells[column].textContent.trim());
    const rows = [...body.rows].map((row) => [row, value(row.cells[column])]);
    rows.sort(([a, x], [b, y]) => empty(a) - empty(b) || compare(x, y) * (down ? -1 : 1));
    body.append(...rows.map(([row]) => row));
  };
  const prepare = () => {
    for (const code of document.querySelectorAll("article :not(pre) > code"))
      if (/^(-\S+|[A-Z_]+)$/.test(code.textContent)) code.classList.add("option");
    for (const image of document.querySelectorAll("article p > img:only-child")) {
      const said = document.createElement("p");
      said.className = "caption";
      said.textContent = image.alt;
      if (!image.parentElement.nextElementSibling?.matches(".caption")) image.parentElement.after(said);
    }
    for (const head of document.querySelectorAll("article table thead th")) {
      const body = head.closest("table").tBodies[0];
      if (head.dataset.sorts || !body || body.rows.length < 3) continue;
      const numbers = [...body.querySelectorAll("td")].filter((cell) => typeof value(cell) === "number");
      if (numbers.length < body.rows.length) continue; // words alone
      head.dataset.sorts = "yes";
      head.tabIndex = 0;
      head.title = "Sort";
      head.addEventListener("click", () => sort(head));
      head.addEventListener("keydown", (event) => event.key === "Enter" && sort(head));
    }
  };
  document.addEventListener("DOMContentLoaded", prepare);
  if (document.readyState !== "loading") prepare();
})();
