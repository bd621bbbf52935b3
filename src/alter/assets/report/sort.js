// a click on a column's name sorts the table by it: numbers first from the largest, text from A, what is missing always last
for (const table of document.querySelectorAll("table.sortable")) {
  const head = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    if (!column) return text.replace(/^[0-9]+ /, "").toLowerCase();
    if (text === "" || text === "-") return null;
    const number = parseFloat(text.replace(/,/g, "").replace(/^[^\p{L}0-9.+-]+/u, ""));
    return Number.isNaN(number) ? text.toLowerCase() : number;
  };
  const compare = (a, b) => (typeof a !== typeof b ? (typeof a === "number" ? -1 : 1) : a < b ? -1 : a > b ? 1 : 0);
  head.forEach((cell, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...cell.childNodes);
    cell.append(button);
    button.addEventListener("click", () => {
      const rows = [...body.rows].map(row => [value(row, column), row]);
      const first = rows.some(each => typeof each[0] === "number") ? "descending" : "ascending";
      const order = cell.getAttribute("aria-sort") !== first ? first : first === "ascending" ? "descending" : "ascending";
      head.forEach(other => other.removeAttribute("aria-sort"));
      cell.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const there = rows.filter(each => each[0] !== null).sort((a, b) => sign * compare(a[0], b[0]));
      body.append(...[...there, ...rows.filter(each => each[0] === null)].map(each => each[1]));
    });
  });
}
