"use strict";
// Controls, deep links (#f=fp16&k=8&r=output&s=name&q=filter), printing, colour scheme.

function remember() {
  const link = new URLSearchParams({ f: state.format.name, k: state.k, r: state.role });
  if (state.filter) link.set("q", state.filter);
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
  if (link.get("r") === "all" || DATA.roles.includes(link.get("r"))) state.role = link.get("r");
  state.filter = link.get("q") || "";
  const found = sites.findIndex((t) => t.name === link.get("s"));
  if (found >= 0) state.selected = found;
}

function buildControls() {
  const shown = RULERS.filter((name) => FORMATS[name]), others = DATA.formats.filter((f) => f.offered && !shown.includes(f.name)).map((f) => f.name);
  byId("formats").append(...shown.map((name) => h("label", {}, h("input", { type: "radio", name: "format", value: name }), name)));
  byId("other").append(h("option", { value: "" }, "other"), ...others.map((name) => h("option", { value: name }, name)));
  const present = DATA.roles.filter((role) => sites.some((t) => t.role === role));
  byId("role").append(...present.map((role) => h("option", { value: role }, role.replace("_", " "))), h("option", { value: "all" }, "all"));
  if (DATA.choice.scale) byId("scale-marks").append(h("option", { value: DATA.choice.scale, label: "loss scale" }));
  byId("scale-marks").append(h("option", { value: 0 }));
  byId("sites").tHead.rows[0].append(...COLUMNS.map((c) => h("th", { scope: "col", class: c.text ? "num" : null, "data-key": c.key, title: c.hint }, h("button", { type: "button", onclick: () => sortBy(c.key) }, c.head))));
}

function showControls() {
  for (const input of document.querySelectorAll('input[name="format"]')) input.checked = input.value === state.format.name;
  byId("other").value = RULERS.includes(state.format.name) ? "" : state.format.name;
  byId("role").value = state.role;
  byId("scale").value = state.k;
  byId("filter").value = state.filter;
}

function sortBy(key) {
  state.down = state.sort === key ? !state.down : key !== "site";
  state.sort = key;
  later();
}

function listen() {
  const set = (change) => { Object.assign(state, change); showControls(); later(); };
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("formats").addEventListener("change", (event) => set({ format: FORMATS[event.target.value] }));
  byId("other").addEventListener("change", (event) => event.target.value && set({ format: FORMATS[event.target.value] }));
  byId("role").addEventListener("change", (event) => set({ role: event.target.value, shown: FEW }));
  byId("scale").addEventListener("input", (event) => { state.k = Number(event.target.value); later(); });
  byId("scale-reset").addEventListener("click", () => set({ k: 0 }));
  byId("filter").addEventListener("input", (event) => { state.filter = event.target.value; later(); });
  byId("csv").addEventListener("click", csv);
  byId("more-button").addEventListener("click", () => set({ shown: rowsShown.length }));
  byId("sites").tBodies[0].addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-index]");
    if (row) choose(Number(row.dataset.index), "table");
  });
  window.addEventListener("resize", () => { later(); drawTraining(); });
  window.addEventListener("hashchange", () => { recall(); showControls(); later(); });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", later);
  for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) {
    window.addEventListener(event, () => { map.printing = printing; repaint(); });
  }
  watchMap(state, choose);
}

if (sites.length) {
  buildControls();
  recall();
  showControls();
  listen();
  repaint();
  if (state.selected < 0 && rowsShown.length && !window.matchMedia("(max-width: 1000px)").matches) {
    state.selected = rowsShown[0].index;
    repaint();
  }
}
drawTraining();

// For scripts and tests: the figures as the table prints them.
window.precscope = {
  sites: sites.map((t) => t.name),
  ask: (index, format, k) => {
    const site = { ...sites[index] };
    site.answer = ask(site, FORMATS[format], k);
    return { ...printed(site), word: word(site, site.answer) };
  },
  set: (change) => {
    Object.assign(state, change, change.format ? { format: FORMATS[change.format] } : {});
    showControls();
    const start = performance.now();
    repaint();
    return performance.now() - start;
  },
};
