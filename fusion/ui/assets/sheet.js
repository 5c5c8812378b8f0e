// The sheet of marks by keys. Without it each mark is a menu, and the form is sent by its button.
"use strict";

const sheet = document.getElementById("sheet");
const menus = [...document.querySelectorAll("table.sheet select")];
const KEYS = { r: "right", w: "wrong", " ": "" };
const first = new Map(menus.map((menu) => [menu, menu.value]));
let sending = false;

const changed = () => menus.filter((menu) => menu.value !== first.get(menu)).length;

/** Sets a mark, and those of equal answers of the row if they are marked together. */
function mark(menu, value) {
  menu.value = value;
  const equal = menu.dataset.equal;
  if (equal !== undefined && document.getElementById("together").checked) {
    for (const other of menu.closest("tr").querySelectorAll(`select[data-equal="${equal}"]`)) other.value = value;
  }
  const count = changed();
  document.getElementById("unsaved").textContent = count ? `${count} not saved yet` : "";
}

/** Returns the next menu in a direction, past cells without an answer; undefined at the edge. */
function beside(menu, across, down) {
  const cell = menu.closest("td");
  const rows = [...cell.closest("tbody").rows];
  let [row, column] = [rows.indexOf(cell.parentElement), cell.cellIndex];
  for (;;) {
    row += down;
    column += across;
    const there = rows[row]?.cells[column];
    if (!there) return undefined;
    const found = there.querySelector("select");
    if (found) return found;
  }
}

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** What a key does to the menu that has the focus; false if it is none of ours. */
function press(key, menu) {
  if (key in MOVES) beside(menu, ...MOVES[key])?.focus();
  else if (key in KEYS) mark(menu, KEYS[key]);
  else if (key === "Enter") menu.closest("td").querySelector("details")?.toggleAttribute("open");
  else if (key === "Escape") menu.blur();
  else if (key === "s") sheet.requestSubmit();
  else if (key === "?") help();
  else return false;
  return true;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const menu = event.target.closest("table.sheet select");
  const free = !event.target.matches("input, textarea, select") && !event.target.closest(".scroll, .text");
  let ours = false;
  if (menu) ours = press(event.key, menu);
  else if (free && event.key === "ArrowRight" && menus.length) {
    (menus.find((one) => !one.value) || menus[0]).focus();
    ours = true;
  }
  if (!ours) return;
  event.preventDefault();
  event.stopImmediatePropagation();
}, true);

document.addEventListener("change", (event) => {
  if (menus.includes(event.target)) mark(event.target, event.target.value);
});
sheet?.addEventListener("submit", () => { sending = true; });
addEventListener("beforeunload", (event) => {
  if (!sending && changed()) event.preventDefault();
});
// After a page that the browser kept was opened again, its menus have what was last chosen.
addEventListener("pageshow", () => { sending = false; });

const saved = document.getElementById("saved");
if (saved) {
  tell(saved.textContent);
  const url = new URL(location.href);
  url.searchParams.delete("saved");
  history.replaceState(null, "", url);
  (menus.find((one) => !one.value) || menus[0])?.focus();
}
