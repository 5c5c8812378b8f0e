// What every page shares: parts of a page that are fetched again, and keys. Pages work without it.
"use strict";

const csrf = () => document.querySelector('meta[name="csrf"]').content;

/** Tells what happened, also to a screen reader. */
function tell(message) {
  const status = document.getElementById("status");
  status.textContent = message;
  clearTimeout(tell.timer);
  tell.timer = setTimeout(() => { status.textContent = ""; }, 6000);
}

/** Replaces the elements with these ids by those of a fetched page; scripts in it do not run. */
function swapIn(html, ids) {
  const fetched = new DOMParser().parseFromString(html, "text/html");
  for (const id of ids.split(" ")) {
    const here = document.getElementById(id);
    const there = fetched.getElementById(id);
    if (!here || !there || here.outerHTML === there.outerHTML) continue;
    // What the reader has opened stays open, and the focus where it was.
    const open = new Set([...here.querySelectorAll("details[open][id]")].map((one) => one.id));
    const checked = new Set([...here.querySelectorAll("input[id]:checked")].map((one) => one.id));
    const focused = here.contains(document.activeElement) ? document.activeElement.id : "";
    const adopted = document.importNode(there, true);
    here.replaceWith(adopted);
    for (const one of adopted.querySelectorAll("details[id]")) if (open.has(one.id)) one.open = true;
    for (const one of adopted.querySelectorAll("input[type=checkbox][id]")) if (checked.has(one.id)) one.checked = true;
    if (focused) document.getElementById(focused)?.focus();
  }
  document.dispatchEvent(new CustomEvent("swapped"));
}

/** Fetches a page and swaps parts of it in; a login that has ended shows as the login. */
async function load(url, ids, options = {}) {
  const response = await fetch(url, { credentials: "same-origin", ...options });
  if (response.redirected && new URL(response.url).pathname.endsWith("/login")) {
    location.assign(response.url);
    return;
  }
  swapIn(await response.text(), ids);
  if (!response.ok) tell(`The server answered with ${response.status}.`);
}

function queryOf(form) {
  const fields = new URLSearchParams();
  for (const [name, value] of new FormData(form)) if (value !== "") fields.append(name, value);
  return fields;
}

async function submit(form) {
  const ids = form.dataset.swap;
  if (form.method === "get") {
    const url = `${form.getAttribute("action") || location.pathname}?${queryOf(form)}`;
    history.replaceState(null, "", url);
    await load(url, ids);
  } else {
    await load(form.action, ids, { method: "POST", body: new URLSearchParams(new FormData(form)) });
  }
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (!form.dataset.swap) return;
  event.preventDefault();
  submit(form).catch(() => tell("The server does not answer."));
});

document.addEventListener("input", (event) => {
  const form = event.target.form;
  if (!form?.dataset.swap || form.method !== "get" || !form.hasAttribute("data-live")) return;
  clearTimeout(form.timer);
  form.timer = setTimeout(() => form.requestSubmit(), 250);
});

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-swap]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  history.pushState(null, "", link.href);
  load(link.href, link.dataset.swap).catch(() => tell("The server does not answer."));
});
window.addEventListener("popstate", () => location.reload());

// Parts that follow what happens; they rest while nobody looks.
setInterval(() => {
  if (document.hidden) return;
  for (const part of document.querySelectorAll("[data-refresh][id]")) {
    const now = Date.now();
    if (now < (refreshed.get(part.id) || 0) + 1000 * Number(part.dataset.refresh)) continue;
    refreshed.set(part.id, now);
    load(location.href, part.id).catch(() => {});
  }
}, 1000);
const refreshed = new Map();
for (const part of document.querySelectorAll("[data-refresh][id]")) refreshed.set(part.id, Date.now());

/** Says which keys there are, those of this page last. */
function help() {
  const own = [...document.querySelectorAll("[data-help]")].map((part) => part.dataset.help);
  tell(["Keys: / searches, j and k go down and up a list, Enter opens, Escape leaves a field.", ...own].join(" "));
}
for (const part of document.querySelectorAll("[data-help]")) part.hidden = false;

let leaving = false;
addEventListener("pageshow", () => { leaving = false; });

// Keys: / searches, j and k go through a list, Enter opens (a link has it by itself), ? says so; a button or a link
// with `data-press` has a key of its own.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, textarea, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const links = [...document.querySelectorAll("[data-keys] a.open")];
  if (event.key === "/") {
    document.querySelector('input[type="search"]')?.focus();
  } else if ((event.key === "j" || event.key === "k") && links.length) {
    const at = links.indexOf(document.activeElement);
    const next = event.key === "j" ? at + 1 : at < 0 ? 0 : at - 1;
    links[Math.max(0, Math.min(links.length - 1, next))].focus();
  } else if (event.key === "?") {
    help();
    return;
  } else {
    const pressed = [...document.querySelectorAll("[data-press]")].find((one) => one.dataset.press === event.key);
    if (!pressed || event.repeat || leaving) return;
    leaving = true; // a second key before the next page comes is one too many
    pressed.click();
  }
  event.preventDefault();
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
  tell("Copied.");
});
