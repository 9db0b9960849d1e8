"use strict";
// One site: what it is, its histogram, its history, the formats side by side, what the plan does there and why.

function paintDetail() {
  const site = sites[state.selected];
  if (!site) {
    panel.replaceChildren(h("p", { class: "soft" }, "Choose a row to see its histogram, its history and why the plan treats it so."));
    return;
  }
  answerOne(site);
  const kin = sites.filter((t) => t.module === site.module && t.call === site.call);
  const bars = s("svg", { role: "img", "aria-label": `Histogram of ${site.name} by powers of two` });
  const line = s("svg", { role: "img", "aria-label": `Largest magnitude of ${site.name} over the steps` });
  const readout = h("div", { class: "small soft readout" });
  const history = site.logs.filter((v) => v !== null).length > 1;
  const open = panel.querySelector("details.counts")?.open;
  const stops = () => [...panel.querySelectorAll("button, summary, [tabindex]")], focused = stops().indexOf(document.activeElement);
  panel.replaceChildren(...[
    h("h3", { class: "mono" }, site.short),
    alikeLine(site),
    h("div", { class: "roles" }, kin.map((t) => h("button", { type: "button", "aria-pressed": String(t.index === site.index), onclick: () => choose(t.index, "roles") }, t.role.replace("_", " ")))),
    factList(site),
    h("h4", {}, "Values per power of two, logarithmic"), bars, countTable(site, open),
    ...(history ? [h("h4", {}, "Largest magnitude by step"), line, readout] : []),
    h("h4", {}, state.own ? "Formats, each at the scale that its largest magnitude allows" : `Formats at scale ${pow2(state.k)}`), formatTable(site),
    ...planPart(site),
  ].filter(Boolean));
  siteHistogram(bars, site, state.format, scaleOf(site));
  if (history) drawHistory(line, readout, site);
  if (focused >= 0) stops()[Math.min(focused, stops().length - 1)].focus({ preventScroll: true });
}

function factList(site) {
  const pairs = [
    ["Largest magnitude", number(site.amax)], ["Smallest non-zero", Number.isFinite(site.amin) ? number(site.amin) : MISSING],
    ["Values seen", site.count.toLocaleString("en-US")], ["Zeros", `${percent(site.zeros / Math.max(site.count, 1))}%`],
    ["inf or NaN", site.nonfinite ? `${percent(site.nonfinite / site.count)}%` : "none"], ["Recorded as", site.sourceName],
    ...(state.own ? [["Scale", pow2(scaleOf(site))]] : []),
    [`In ${state.format.name}`, h("span", { class: `verdict-word ${WORD_CLASS[site.word]}` }, site.word)],
  ];
  return h("dl", {}, pairs.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

// Where the table's row stands for several sites: which of them this is, and how to see all.
function alikeLine(site) {
  const row = state.alike && rowsShown.find((t) => t.members && holds(t, site.index));
  if (!row) return null;
  const show = () => {
    Object.assign(state, { alike: false, page: 0, only: "", filter: site.alike.split("*").filter((part) => part.length > 1).join(" ") });
    showControls();
    later();
  };
  return h("p", { class: "small soft" }, `${row.worst === site ? "The worst" : "One"} of ${row.members.length} alike: ${row.short}. `, h("button", { type: "button", class: "plain", onclick: show }, "Show each"));
}

function countTable(site, open) {
  if (!site.counts.length) return null;
  const box = h("details", { class: "counts small", open });
  const build = () => {
    if (!box.open || box.childElementCount > 1) return;
    const rows = site.counts.map((n, j) => [site.lo + j, n]).filter((pair) => pair[1]).reverse();
    box.append(h("div", { class: "scroll short", tabindex: 0, role: "region", "aria-label": "Counts per power of two" }, h("table", {}, h("caption", { class: "hidden-label" }, `Values of ${site.name} per power of two`),
      h("thead", {}, h("tr", {}, ["From", "Values", `In ${state.format.name}`].map((head, i) => h("th", { scope: "col", class: i === 1 ? "num" : null }, head)))),
      h("tbody", {}, rows.map(([e, n]) => h("tr", {}, h("th", { scope: "row" }, pow2(e)), h("td", { class: "num" }, n.toLocaleString("en-US")), h("td", {}, region(site, state.format, scaleOf(site), e))))))));
  };
  box.append(h("summary", {}, "Counts as a table"));
  box.addEventListener("toggle", build);
  build();
  return box;
}

function formatTable(site) {
  const names = [...new Set([...RULERS.filter((name) => FORMATS[name]), state.format.name])];
  const heads = ["Format", "Verdict", "Flushed %", "SQNR dB", ...(site.prices ? ["Loss noise"] : [])];
  const rows = names.map((name) => {
    const fmt = FORMATS[name], answer = ask(site, fmt, scaleOf(site, fmt)), said = word(site, answer, state.own);
    const pick = h("button", { type: "button", class: "plain", "aria-pressed": String(fmt === state.format), onclick: () => { state.format = fmt; showControls(); later(); } }, name);
    return h("tr", { class: fmt === state.format ? "chosen" : null }, h("th", { scope: "row" }, pick), h("td", {}, h("span", { class: `verdict-word ${WORD_CLASS[said]}` }, said)),
      h("td", { class: "num" }, percent(answer.flushed)), h("td", { class: "num" }, fixed(answer.sqnr)), site.prices ? h("td", { class: "num" }, number(answer.lossNoise)) : null);
  });
  return h("div", { class: "scroll formats", tabindex: 0, role: "region", "aria-label": "Formats side by side" }, h("table", {}, h("caption", { class: "hidden-label" }, `${site.name} in each format`),
    h("thead", {}, h("tr", {}, heads.map((head, i) => h("th", { scope: "col", class: i > 1 ? "num" : null }, head)))), h("tbody", {}, rows)));
}

// What the plan does there, its reasons, and what they rest on.
function planPart(site) {
  const plan = DATA.plan[site.module];
  if (!plan) return [];
  const [compute, params, reasons, evidence] = plan, list = [];
  if (evidence) {
    const [from, times, noise, forbidden] = evidence, said = (figures) => Object.entries(figures).map(([f, v]) => `${f} ${number(v)}`).join(", ");
    if (Object.values(times).some((ms) => ms > 0)) list.push(["Time, ms", `${said(times)}${from ? ` (${from})` : ""}`]);
    if (Object.values(noise).some((v) => v > 0)) list.push(["Loss noise", said(noise)]);
    if (forbidden.length) list.push(["Not allowed", forbidden.join(", ")]);
  }
  return [
    h("h4", {}, "In the plan: ", h("span", { class: "tag" }, compute), params !== "fp32" ? ` parameters in ${params}` : ""),
    h("ul", { class: "reasons small" }, reasons.map((i) => h("li", {}, DATA.reasons[i]))),
    list.length ? h("dl", { class: "evidence" }, list.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])) : null,
  ];
}

function drawHistory(line, readout, site) {
  const points = site.logs.map((v, i) => [DATA.steps[i], v]), limit = Math.log2(state.format.max) - scaleOf(site);
  const seen = site.logs.filter((v) => v !== null), near = limit - Math.max(...seen) < 8;
  lineChart(line, [{ name: "largest magnitude", color: "var(--normal)", points }], {
    height: 110, ticks: (lo, hi, n) => niceTicks(lo, hi, n).filter(Number.isInteger), yText: pow2, valueText: (v) => number(2 ** v), readout, marks: site.broken.map((i) => DATA.steps[i]),
    range: [Math.floor(Math.min(...seen)), Math.ceil(Math.max(...seen, Math.min(...seen) + 1))],
    lines: [{ y: limit, include: near, text: `${state.format.name} ends`, color: "var(--overflow)" }],
  });
}
