// a click on a column's name sorts the table by it: numbers first from the largest, other text from A
for (const table of document.querySelectorAll("table.sortable")) {
  const head = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim().replace(/,/g, "");
    const number = parseFloat(text.replace(/^[^0-9.+-]+/, ""));
    return column && !Number.isNaN(number) ? number : column ? -Infinity : text.replace(/^[0-9]+ /, "").toLowerCase();
  };
  head.forEach((cell, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...cell.childNodes);
    cell.append(button);
    button.addEventListener("click", () => {
      const now = cell.getAttribute("aria-sort"), first = column ? "descending" : "ascending";
      const order = now === first ? (column ? "ascending" : "descending") : first;
      head.forEach(other => other.removeAttribute("aria-sort"));
      cell.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].map(row => [value(row, column), row]);
      rows.sort((a, b) => (a[0] < b[0] ? -sign : a[0] > b[0] ? sign : 0));
      body.append(...rows.map(each => each[1]));
    });
  });
}
