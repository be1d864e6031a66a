// Filters, sorts and folds the table of runs; a run and the members of its sweep are one tbody.
const table = document.querySelector("table"), words = document.querySelector("#words"), state = document.querySelector("#state");

function filter() {
  const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const body of table.tBodies) {
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !wanted.every(word => text.includes(word)) || Boolean(state.value && row.dataset.state !== state.value);
    }
    const members = [...body.rows].slice(1), shown = members.some(row => !row.hidden);
    if (shown) body.rows[0].hidden = false;
    if (members.length) fold(body, !(shown && (wanted.length || state.value)));
  }
}

function fold(body, folded) {
  body.classList.toggle("folded", folded);
  body.querySelector("button").setAttribute("aria-expanded", !folded);
}

function sort(header) {
  const up = header.getAttribute("aria-sort") !== "ascending", column = header.cellIndex;
  const key = row => row.cells[column]?.dataset.key ?? "";
  const order = (x, y) => {  // what has no value comes last
    if (!x || !y) return !x - !y;
    const difference = isNaN(x - y) ? x.localeCompare(y, undefined, {numeric: true}) : x - y;
    return up ? difference : -difference;
  };
  const best = body => [...body.rows].map(key).sort(order)[0];
  for (const body of [...table.tBodies].sort((a, b) => order(best(a), best(b)))) {
    body.append(...[...body.rows].slice(1).sort((a, b) => order(key(a), key(b))));
    table.append(body);
  }
  for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
}

words.addEventListener("input", filter);
state.addEventListener("input", filter);
table.addEventListener("click", ({target}) => {
  const button = target.closest("button");
  if (button?.closest("thead")) sort(button.closest("th"));
  else if (button) fold(button.closest("tbody"), !button.closest("tbody").classList.contains("folded"));
});
filter();
