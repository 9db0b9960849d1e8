"use strict";
// Controls, deep links, printing, colour scheme. A link: #f=fp16&k=8&r=output&q=words&v=verdict&o=-flushed&g=1&m=steps&s=site

function remember() {
  const link = new URLSearchParams({ f: state.format.name, k: state.own ? "own" : state.k, r: state.role });
  if (state.filter) link.set("q", state.filter);
  if (state.only) link.set("v", state.only);
  if (state.sort !== "word" || !state.down) link.set("o", (state.down ? "" : "-") + state.sort);
  if (state.alike !== DATA.choice.alike) link.set("g", Number(state.alike));
  if (state.map !== "magnitudes") link.set("m", state.map);
  if (sites[state.selected]) link.set("s", sites[state.selected].name);
  try {
    history.replaceState(null, "", `#${link}`);
  } catch (error) { /* some viewers forbid it for local files; the page works without */ }
}

function recall() {
  const link = new URLSearchParams(location.hash.slice(1));
  if (!link.has("f")) return;
  if (FORMATS[link.get("f")]?.offered) state.format = FORMATS[link.get("f")];
  const k = Math.round(Number(link.get("k")));
  if (Math.abs(k) <= 40) state.k = k;
  state.own = link.get("k") === "own";
  if (link.get("r") === "all" || DATA.roles.includes(link.get("r"))) state.role = link.get("r");
  state.filter = link.get("q") || "";
  state.only = WORDS.includes(link.get("v")) ? link.get("v") : "";
  const order = link.get("o") || "word", sort = order.replace(/^-/, "");
  if (COLUMNS.some((c) => c.key === sort)) Object.assign(state, { sort, down: order === sort });
  state.alike = link.has("g") ? link.get("g") === "1" : DATA.choice.alike;
  state.map = link.get("m") === "steps" ? "steps" : "magnitudes";
  const found = sites.findIndex((t) => t.name === link.get("s"));
  if (found >= 0) state.selected = found;
}

// The page of the table on which the chosen site is.
function turnToSelected() {
  const place = rowsShown.findIndex((row) => holds(row, state.selected));
  if (place >= 0) state.page = Math.floor(place / state.shown);
}

function buildControls() {
  const shown = RULERS.filter((name) => FORMATS[name]), others = DATA.formats.filter((f) => f.offered && !shown.includes(f.name)).map((f) => f.name);
  byId("formats").append(...shown.map((name) => h("label", {}, h("input", { type: "radio", name: "format", value: name }), name)));
  byId("other").append(h("option", { value: "" }, "other"), ...others.map((name) => h("option", { value: name }, name)));
  const present = DATA.roles.filter((role) => sites.some((t) => t.role === role));
  byId("role").append(...present.map((role) => h("option", { value: role }, role.replace("_", " "))), h("option", { value: "all" }, "all"));
  if (DATA.choice.scale) byId("scale-marks").append(h("option", { value: DATA.choice.scale, label: "loss scale" }));
  byId("scale-marks").append(h("option", { value: 0 }));
  byId("scale-plan").append(h("span", { class: "wide" }, "Loss scale "), pow2(DATA.choice.scale));
  byId("words").append(...[...WORDS].reverse().map((w) => h("button", { type: "button", "data-word": w, onclick: () => set({ only: state.only === w ? "" : w, page: 0 }) }, h("span", { class: `verdict-word ${WORD_CLASS[w]}` }, w), h("span", {}))));
  byId("alike").closest("label").hidden = groupAlike(sites).length === sites.length;
  byId("map-kind").hidden = DATA.steps.length < 2;
  byId("sizes").append(...[20, 50, 200, 1000].map((n) => h("option", { value: n }, String(n))));
  byId("sites").tHead.rows[0].append(...COLUMNS.map((c) => h("th", { scope: "col", class: c.text ? "num" : null, "data-key": c.key, title: c.hint }, h("button", { type: "button", onclick: () => sortBy(c.key) }, c.head))));
}

function showControls() {
  for (const input of document.querySelectorAll('input[name="format"]')) input.checked = input.value === state.format.name;
  for (const input of document.querySelectorAll('input[name="map"]')) input.checked = input.value === state.map;
  byId("other").value = RULERS.includes(state.format.name) ? "" : state.format.name;
  byId("role").value = state.role;
  byId("scale").value = state.k;
  byId("filter").value = state.filter;
  byId("alike").checked = state.alike;
  byId("own").checked = state.own;
  byId("sizes").value = [20, 50, 200, 1000].find((n) => n >= state.shown) || 1000;
  byId("ranges").classList.toggle("growing", growing());
}

function sortBy(key) {
  state.down = state.sort === key ? !state.down : key !== "site";
  state.sort = key;
  state.page = 0;
  later();
}

function set(change) {
  Object.assign(state, change);
  showControls();
  later();
}

async function copyLink() {
  remember();
  let said = "Link copied";
  try {
    await navigator.clipboard.writeText(location.href);
  } catch (error) {
    said = "The address bar holds the link";
  }
  byId("link-said").textContent = said;
  setTimeout(() => (byId("link-said").textContent = ""), 4000);
}

function listen() {
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("formats").addEventListener("change", (event) => set({ format: FORMATS[event.target.value] }));
  byId("other").addEventListener("change", (event) => event.target.value && set({ format: FORMATS[event.target.value] }));
  byId("role").addEventListener("change", (event) => set({ role: event.target.value, page: 0 }));
  byId("scale").addEventListener("input", (event) => { state.k = Number(event.target.value); later(); });
  byId("scale-reset").addEventListener("click", () => set({ k: 0, own: false }));
  byId("scale-plan").addEventListener("click", () => set({ k: DATA.choice.scale, own: false }));
  byId("own").addEventListener("change", (event) => set({ own: event.target.checked }));
  byId("map-kind").addEventListener("change", (event) => set({ map: event.target.value }));
  byId("alike").addEventListener("change", (event) => set({ alike: event.target.checked, page: 0 }));
  byId("filter").addEventListener("input", (event) => { state.filter = event.target.value; state.page = 0; later(); });
  byId("csv").addEventListener("click", shownCsv);
  byId("link").addEventListener("click", copyLink);
  byId("page-back").addEventListener("click", () => set({ page: state.page - 1 }));
  byId("page-on").addEventListener("click", () => set({ page: state.page + 1 }));
  byId("sizes").addEventListener("change", (event) => set({ shown: Number(event.target.value), page: 0 }));
  byId("sites").tBodies[0].addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-index]");
    if (row && !event.target.closest(".detail-row")) choose(Number(row.dataset.index), "table");
  });
  window.addEventListener("resize", () => { later(); drawTraining(); });
  window.addEventListener("hashchange", () => { recall(); showControls(); later(); });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", later);
  for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) {
    window.addEventListener(event, () => {
      map.printing = printing;
      document.documentElement.classList.toggle("printing", printing);  // canvases are drawn now: on white paper
      repaint();
    });
  }
  watchMap(state, choose);
}

if (sites.length) {
  buildControls();
  recall();
  showControls();
  listen();
  repaint();
  if (state.selected < 0 && rowsShown.length && !NARROW.matches) state.selected = rowsShown[0].index;
  turnToSelected();
  repaint();
}
buildTables();
drawTraining();

// For scripts and tests: the figures as the table prints them.
window.precscope = {
  saveCsv,
  sites: sites.map((t) => t.name),
  ask: (index, format, k) => {
    const site = { ...sites[index] };
    site.answer = ask(site, FORMATS[format], k);
    return { ...printed(site), word: word(site, site.answer) };
  },
  set: (change) => {
    Object.assign(state, change.shown ? { page: 0 } : {}, change, change.format ? { format: FORMATS[change.format] } : {});
    showControls();
    const start = performance.now();
    repaint();
    return performance.now() - start;
  },
};
