// Keeps the page true: fetches it again each second and changes what differs, so that focus,
// selection and scroll position stay where they are.
"use strict";

const EVERY_MS = 1000;
let frozen = false, failing = false;

function morph(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) {
    old.replaceWith(document.importNode(fresh, true));
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  if (old.isEqualNode(fresh) || old.nodeName === "SCRIPT" || old.nodeName === "BUTTON") return;
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  children(old, fresh);
}

// Children with an id are matched by it, so that a section that comes or goes moves no other.
function children(old, fresh) {
  const named = new Map([...old.children].filter((c) => c.id).map((c) => [c.id, c]));
  let at = old.firstChild;
  for (const want of [...fresh.childNodes]) {
    let have = want.id ? named.get(want.id) : at;
    if (!have || (!want.id && have.id)) {
      old.insertBefore(document.importNode(want, true), at);
      continue;
    }
    if (have !== at) old.insertBefore(have, at);
    at = have.nextSibling;
    morph(have, want);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

async function refresh() {
  try {
    const answer = await fetch(location.search || "?", { signal: AbortSignal.timeout(8000) });
    if (!answer.ok) throw new Error(`the gateway answers ${answer.status}`);
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (frozen) return;
    document.title = fresh.title;
    morph(document.body, fresh.body);
    failing = false;
  } catch (error) {
    failing = true;
    const since = document.getElementById("live");
    if (!since.dataset.since) since.dataset.since = since.textContent;
    since.textContent = `no answer since ${since.dataset.since}`;
  }
  document.documentElement.classList.toggle("stale", failing);
  if (!failing) delete document.getElementById("live").dataset.since;
}

async function follow() {
  for (;;) {
    await new Promise((done) => setTimeout(done, EVERY_MS));
    if (!frozen && !document.hidden) await refresh();
  }
}

// A choice changes the address and the page, and does not load it anew.
document.addEventListener("click", async (event) => {
  const link = event.target.closest("a[href^='?']");
  if (!link || event.metaKey || event.ctrlKey || event.shiftKey || event.button) return;
  event.preventDefault();
  history.pushState(null, "", link.getAttribute("href"));
  await refresh();
  const target = document.getElementById(location.hash.slice(1));
  if (target && !visible(target)) target.scrollIntoView({ block: "start" });
});
window.addEventListener("popstate", refresh);

function visible(element) {
  const { top } = element.getBoundingClientRect();
  return top >= 0 && top < innerHeight * 0.6;
}

const freeze = document.getElementById("freeze");
freeze.addEventListener("click", () => {
  frozen = !frozen;
  freeze.setAttribute("aria-pressed", String(frozen));
  freeze.textContent = frozen ? "frozen: go on" : "freeze";
});

const THEMES = ["", "light", "dark"];
const theme = document.getElementById("theme");
function paint(name) {
  document.documentElement.dataset.theme = name;
  theme.textContent = name ? `theme: ${name}` : "theme: system";
}
paint(localStorage.getItem("theme") || "");
theme.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  localStorage.setItem("theme", next);
  paint(next);
});

follow();
