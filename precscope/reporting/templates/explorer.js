"use strict";
// The what-if explorer: one state, one repaint. Every control changes `state` and calls `repaint`.

const FORMATS = Object.fromEntries(DATA.formats.map((f) => [f.name, f]));
const NAME = window.matchMedia("(max-width: 560px)").matches ? 20 : 32;
const FEW = window.matchMedia("(max-width: 1000px)").matches ? 20 : 40;
const state = { format: FORMATS[DATA.choice.format], k: 0, role: DATA.choice.role, filter: "", sort: "word", down: true, selected: -1, shown: FEW, allRoles: false };
const sites = DATA.sites.map(readSite);

function readSite(row, index) {
  const [module, role, call, count, zeros, nonfinite, amax, amin, sumsq, source, sourceExponent, lo, counts, history, broken, prices] = row;
  const owner = DATA.modules[module] || "(root)", times = call ? `#${call}` : "";
  const logs = (history || []).map((v) => (v === null ? null : v / 100));
  const seen = logs.filter((v) => v !== null);
  return {
    index, module, role: DATA.roles[role], call, count, zeros, nonfinite, amax, amin: amin === null ? Infinity : amin, sumsq,
    source: FORMATS[DATA.sources[source]] || null, sourceName: DATA.sources[source], sourceExponent, lo, counts, prices: prices && prices.map(readPrice), broken: broken || [], logs,
    finite: counts.reduce((a, b) => a + b, 0), least: seen.length ? 2 ** Math.min(...seen) : 0,
    short: owner + times, name: `${owner}${times}.${DATA.roles[role]}`, answer: null, word: "",
  };
}

function readPrice([lo, weights, source = 0, sourceExponent = 0, alone = 0, rounded = {}]) {
  return { lo, weights: weights.map((w) => (w === null ? Infinity : w)), source: FORMATS[DATA.sources[source]] || null, sourceExponent, alone, rounded };
}

const badness = (site) => WORDS.indexOf(site.word) * 1e6 + 1e5 * Math.min(site.answer.overflowHi + site.answer.flushed, 1) - Math.max(-500, Math.min(site.answer.room, 500));

// Columns: head, explanation, how to sort, what to print.
const COLUMNS = [
  { key: "site", head: "Site", value: (t) => t.index, cell: null },
  { key: "word", head: "Verdict", hint: "sorted from harmful to harmless", value: badness, cell: (t) => h("span", { class: `verdict-word ${WORD_CLASS[t.word]}` }, t.word) },
  { key: "overflow", head: "Overflow", hint: "share that rounds beyond the largest finite value; an interval where the histogram cannot tell", value: (t) => t.answer.overflowHi, text: (t) => interval(t.answer.overflowLo, t.answer.overflowHi) },
  { key: "flushed", head: "Flushed", hint: "non-zero values that round to zero", value: (t) => t.answer.flushed, text: (t) => percent(t.answer.flushed) },
  { key: "subnormal", head: "Subnormal", hint: "values that lose bits below the smallest normal", value: (t) => t.answer.subnormal, text: (t) => percent(t.answer.subnormal) },
  { key: "sqnr", head: "SQNR dB", hint: "signal to quantisation noise of what stays in range", value: (t) => -t.answer.sqnr, text: (t) => fixed(t.answer.sqnr) },
  { key: "noise", head: "Loss noise", hint: "standard deviation of the change of one step's loss if this tensor alone were rounded, priced in shadow steps", value: (t) => t.answer.lossNoise, text: (t) => number(t.answer.lossNoise), only: () => sites.some((t) => t.prices) },
  { key: "room", head: "Head-room", hint: "binades from the largest magnitude to the largest finite value", value: (t) => -t.answer.room, text: (t) => (Number.isFinite(t.answer.room) ? fixed(t.answer.room) : MISSING) },
].filter((column) => !column.only || column.only());

const printed = (site) => Object.fromEntries(COLUMNS.filter((c) => c.text).map((c) => [c.key, c.text(site)]));

function chosenSites() {
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  return sites.filter((t) => (state.role === "all" || t.role === state.role) && words.every((w) => t.name.toLowerCase().includes(w)));
}

function answerAll(list) {
  for (const site of list) {
    site.answer = ask(site, state.format, state.k);
    site.word = word(site, site.answer);
  }
}

function sorted(list) {
  const column = COLUMNS.find((c) => c.key === state.sort) || COLUMNS[1];
  const order = (v) => (Number.isNaN(v) ? -Infinity : v);
  const keyed = list.map((t) => [order(column.value(t)), t]);
  keyed.sort((a, b) => (a[0] === b[0] ? a[1].index - b[1].index : (state.down ? b[0] > a[0] : a[0] > b[0]) ? 1 : -1));
  return keyed.map((pair) => pair[1]);
}

const panel = byId("detail");
let rowsShown = [], mapKey = "";

function repaint() {
  const list = chosenSites();
  answerAll(list);
  const key = `${state.role}|${state.filter}`;
  state.allRoles = state.role === "all";
  if (key !== mapKey) layoutMap(list);
  mapKey = key;
  drawMap(state);
  rowsShown = sorted(list);
  paintTable();
  paintControls(list);
  paintDetail();
}

let queued = false;

function later() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => {
    queued = false;
    repaint();
    remember();
  });
}

function paintControls(list) {
  byId("scale-out").textContent = `×${pow2(state.k)}`;
  byId("scale").setAttribute("aria-valuetext", `two to the power ${state.k}`);
  byId("scale-reset").disabled = state.k === 0;
  byId("count").textContent = list.length === sites.length ? `${sites.length} sites` : `${list.length} of ${sites.length} sites`;
  byId("explorer-text").textContent = `Each recorded tensor, were it multiplied by ${pow2(state.k)} and rounded to ${state.format.name} (nearest even; shares in percent of all values; largest value ${number(state.format.max)}, smallest normal ${pow2(state.format.emin)}, smallest subnormal ${pow2(state.format.emin - state.format.p)}).`;
  byId("map-text").textContent = describeMap(state);
  for (const head of byId("sites").querySelectorAll("thead th")) {
    head.setAttribute("aria-sort", head.dataset.key === state.sort ? (state.down ? "descending" : "ascending") : "none");
  }
}

// Cells are reused: a slider moves figures, it does not rebuild the table.
function paintTable() {
  const body = byId("sites").tBodies[0], wanted = Math.min(rowsShown.length, state.shown);
  const split = document.querySelector(".split");
  if (panel.parentElement !== split) split.append(panel);
  body.querySelector(".detail-row")?.remove();
  while (body.rows.length < wanted) body.append(newRow());
  while (body.rows.length > wanted) body.lastElementChild.remove();
  for (let i = 0; i < wanted; i++) fillRow(body.rows[i], rowsShown[i]);
  byId("more").hidden = rowsShown.length <= wanted;
  byId("more-button").textContent = `Show all ${rowsShown.length}`;
  placeDetail(body);
}

function newRow() {
  const head = h("th", { scope: "row" }, h("button", { type: "button", class: "plain" }), h("span", { class: "role" }));
  const cells = COLUMNS.slice(1).map((c) => h("td", { class: c.text ? "num" : null }));
  return h("tr", {}, head, ...cells);
}

function fillRow(row, site) {
  if (row.dataset.index !== String(site.index)) {
    row.dataset.index = site.index;
    const button = row.cells[0].firstChild, role = row.cells[0].lastChild;
    button.textContent = shorten(site.short, NAME);
    button.title = site.name;
    role.textContent = state.allRoles ? site.role.replace("_", " ") : "";
  }
  row.classList.toggle("chosen", site.index === state.selected);
  row.cells[0].firstChild.setAttribute("aria-expanded", site.index === state.selected);
  COLUMNS.slice(1).forEach((column, i) => {
    const cell = row.cells[i + 1];
    if (!column.text) {
      if (cell.textContent !== site.word) cell.replaceChildren(column.cell(site));
      return;
    }
    const text = column.text(site);
    if (cell.textContent === text) return;
    if (text === "0") cell.replaceChildren(h("span", { class: "zero" }, "0"));
    else cell.textContent = text;
  });
}

// On narrow screens the details open below their row, on wide ones they stand beside the table.
function placeDetail(body) {
  const narrow = window.matchMedia("(max-width: 1000px)").matches && !map.printing;
  panel.hidden = false;
  if (!narrow) return;
  const row = [...body.rows].find((r) => r.dataset.index === String(state.selected));
  panel.hidden = !row;
  if (!row) return;
  body.closest(".scroll").style.setProperty("--detail-width", `${body.closest(".scroll").clientWidth}px`);
  row.after(h("tr", { class: "detail-row" }, h("td", { colspan: COLUMNS.length }, panel)));
}

function paintDetail() {
  const site = sites[state.selected];
  if (!site) {
    panel.replaceChildren(h("p", { class: "soft" }, "Choose a row to see its histogram, its history and why the plan treats it so."));
    return;
  }
  if (!site.answer || state.role !== "all" || state.filter) site.answer = ask(site, state.format, state.k);
  site.word = word(site, site.answer);
  const plan = DATA.plan[site.module], kin = sites.filter((t) => t.module === site.module && t.call === site.call);
  const pairs = [
    ["Largest magnitude", number(site.amax)], ["Smallest non-zero", Number.isFinite(site.amin) ? number(site.amin) : MISSING],
    ["Values seen", site.count.toLocaleString("en-US")], ["Zeros", `${percent(site.zeros / Math.max(site.count, 1))}%`],
    ["inf or NaN", site.nonfinite ? `${percent(site.nonfinite / site.count)}%` : "none"], ["Recorded as", site.sourceName],
    [`In ${state.format.name}`, h("span", { class: `verdict-word ${WORD_CLASS[site.word]}` }, site.word)],
  ];
  const bars = s("svg", { role: "img", "aria-label": `Histogram of ${site.name} by powers of two` });
  const line = s("svg", { role: "img", "aria-label": `Largest magnitude of ${site.name} over the steps` });
  const readout = h("div", { class: "small soft" });
  panel.replaceChildren(...[
    h("h3", { class: "mono" }, site.short),
    h("div", { class: "roles" }, kin.map((t) => h("button", { type: "button", "aria-pressed": String(t.index === site.index), onclick: () => choose(t.index, "roles") }, t.role.replace("_", " ")))),
    h("dl", {}, pairs.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    h("h4", {}, "Values per power of two, logarithmic"), bars,
    ...(site.logs.filter((v) => v !== null).length > 1 ? [h("h4", {}, "Largest magnitude by step"), line, readout] : []),
    ...(plan ? [h("h4", {}, "In the plan: ", h("span", { class: "tag" }, plan[0]), plan[1] !== "fp32" ? ` parameters in ${plan[1]}` : ""), h("ul", { class: "reasons small" }, plan[2].map((reason) => h("li", {}, reason)))] : []),
  ]);
  siteHistogram(bars, site, state.format, state.k);
  if (line.isConnected) {
    const points = site.logs.map((v, i) => [DATA.steps[i], v]), limit = Math.log2(state.format.max) - state.k;
    const seen = site.logs.filter((v) => v !== null), near = limit - Math.max(...seen) < 8;
    lineChart(line, [{ name: "log2 amax", color: "var(--normal)", points }], {
      height: 110, ticks: (lo, hi, n) => niceTicks(lo, hi, n).filter(Number.isInteger), yText: pow2, marks: site.broken.map((i) => DATA.steps[i]),
      range: [Math.floor(Math.min(...seen)), Math.ceil(Math.max(...seen, Math.min(...seen) + 1))],
      lines: [{ y: limit, include: near, text: `${state.format.name} ends`, color: "var(--overflow)" }],
    });
  }
}

function choose(index, from) {
  const role = sites[index].role;
  state.selected = index === state.selected && from === "table" && window.matchMedia("(max-width: 1000px)").matches ? -1 : index;
  if (state.role !== "all" && role !== state.role) {
    state.role = role;
    byId("role").value = role;
  }
  if (from === "map" && rowsShown.findIndex((t) => t.index === index) >= state.shown) state.shown = rowsShown.length;
  later();
}

function csv() {
  const quote = (v) => { const text = String(v); return /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `"'${text.replaceAll('"', '""')}"` : `"${text.replaceAll('"', '""')}"`; };
  const head = ["module", "role", "call", "format", "scale_exponent", "count", "amax", "amin_nonzero", "zeros", "nonfinite", "overflow_lo", "overflow_hi", "flushed", "subnormal", "sqnr_db", "loss_noise"];
  const lines = rowsShown.map((t) => [DATA.modules[t.module], t.role, t.call, state.format.name, state.k, t.count, t.amax, t.amin, t.zeros / Math.max(t.count, 1), t.nonfinite / Math.max(t.count, 1), t.answer.overflowLo, t.answer.overflowHi, t.answer.flushed, t.answer.subnormal, t.answer.sqnr, t.answer.lossNoise].map(quote).join(","));
  download(`precscope-${state.format.name}-${state.role}.csv`, [head.join(","), ...lines].join("\r\n") + "\r\n", "text/csv");
}
