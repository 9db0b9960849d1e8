"use strict";
// Sites as the page holds them, what was chosen of them, and those alike as one row.

const FORMATS = Object.fromEntries(DATA.formats.map((f) => [f.name, f]));
const NARROW = window.matchMedia("(max-width: 1000px)"), SMALL = window.matchMedia("(max-width: 560px)");
const NAME = SMALL.matches ? 20 : 32;
const FEW = NARROW.matches ? 20 : 50;
const state = {
  format: FORMATS[DATA.choice.format], k: 0, role: DATA.choice.role, filter: "", only: "", sort: "word", down: true, selected: -1, page: 0, shown: FEW,
  own: false, alike: DATA.choice.alike, map: "magnitudes", allRoles: false,
};
const sites = DATA.sites.map(readSite);

function readSite(row, index) {
  const [module, role, call, count, zeros, nonfinite, amax, amin, sumsq, source, sourceExponent, lo, counts, history, broken, prices] = row;
  const owner = DATA.modules[module] || "(root)", times = call ? `#${call}` : "";
  const logs = (history || []).map((v) => (v === null ? null : v / 100));
  const seen = logs.filter((v) => v !== null);
  const name = `${owner}${times}.${DATA.roles[role]}`;
  return {
    index, module, role: DATA.roles[role], call, count, zeros, nonfinite, amax, amin: amin === null ? Infinity : amin, sumsq,
    source: FORMATS[DATA.sources[source]] || null, sourceName: DATA.sources[source], sourceExponent, lo, counts, prices: prices && prices.map(readPrice), broken: broken || [], logs,
    finite: counts.reduce((a, b) => a + b, 0), least: seen.length ? 2 ** Math.min(...seen) : 0,
    short: owner + times, name, lower: name.toLowerCase(), alike: (DATA.patterns[module] || "(root)") + times, answer: null, word: "", members: null,
  };
}

function readPrice([lo, weights, source = 0, sourceExponent = 0, alone = 0, rounded = {}]) {
  return { lo, weights: weights.map((w) => (w === null ? Infinity : w)), source: FORMATS[DATA.sources[source]] || null, sourceExponent, alone, rounded };
}

function chosenSites() {
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  return sites.filter((t) => (state.role === "all" || t.role === state.role) && words.every((w) => t.lower.includes(w)));
}

// The exponent of the scale that a tensor is multiplied by: that of the slider, or, as 8-bit formats are used, its own.
const scaleOf = (site, fmt = state.format) => (state.own ? ownScale(site.amax, fmt) : state.k);

function answerAll(list) {
  for (const site of list) answerOne(site);
}

function answerOne(site) {
  site.answer = ask(site, state.format, scaleOf(site));
  site.word = word(site, site.answer, state.own);
}

// Sites whose names differ only in their numbers, as one: histograms add up. A site that has no like stays itself.
function groupAlike(list) {
  const groups = new Map();
  for (const site of list) {
    const key = `${site.alike} ${site.role}`;
    if (groups.has(key)) groups.get(key).push(site);
    else groups.set(key, [site]);
  }
  return [...groups.values()].map((members) => (members.length === 1 ? members[0] : merged(members)));
}

function merged(members) {
  const filled = members.filter((t) => t.counts.length), lo = Math.min(...filled.map((t) => t.lo));
  const counts = filled.length ? new Array(Math.max(...filled.map((t) => t.lo + t.counts.length)) - lo).fill(0) : [];
  for (const t of filled) t.counts.forEach((n, j) => (counts[t.lo - lo + j] += n));
  const first = members[0], sum = (name) => members.reduce((total, t) => total + t[name], 0), most = (name) => members.reduce((a, t) => Math.max(a, t[name]), 0);
  const logs = first.logs.map((_, i) => members.reduce((a, t) => (t.logs[i] !== null && (a === null || t.logs[i] > a) ? t.logs[i] : a), null));
  const seen = logs.filter((v) => v !== null);
  return {
    members, index: first.index, module: first.module, role: first.role, call: first.call, lo: filled.length ? lo : EXP_LO, counts, count: sum("count"), zeros: sum("zeros"), nonfinite: sum("nonfinite"),
    amax: most("amax"), finite: sum("finite"), logs, least: seen.length ? 2 ** Math.min(...seen) : 0, broken: [...new Set(members.flatMap((t) => t.broken))],
    short: first.alike, name: `${first.alike}.${first.role}`, answer: null, word: "", worst: first,
  };
}

// Shares add up by their counts, signal and noise as they are, variances of the loss too; the word is the worst one.
function answerGroup(group) {
  let count = 0, lo = 0, hi = 0, flushed = 0, subnormal = 0, signal = 0, noise = 0, variance = 0, priced = false, exact = true, room = Infinity, worst = group.members[0];
  for (const t of group.members) {
    const a = t.answer, n = Math.max(t.count, 1);
    count += n;
    lo += a.overflowLo * n;
    hi += a.overflowHi * n;
    flushed += a.flushed * n;
    subnormal += a.subnormal * n;
    signal += a.signal;
    noise += a.noise;
    exact = exact && !Number.isNaN(a.sqnr);
    if (!Number.isNaN(a.lossNoise)) { variance += a.lossNoise ** 2; priced = true; }
    room = Math.min(room, a.room);
    if (badness(t) > badness(worst)) worst = t;
  }
  group.worst = worst;
  group.index = worst.index;
  group.word = worst.word;
  group.same = group.members.filter((t) => t.word === worst.word).length;
  group.answer = {
    overflowLo: lo / count, overflowHi: hi / count, flushed: flushed / count, subnormal: subnormal / count, signal, noise, room,
    sqnr: noise > 0 ? 10 * Math.log10(signal / noise) : exact ? Infinity : NaN, lossNoise: priced ? Math.sqrt(variance) : NaN,
  };
}

const badness = (site) => WORDS.indexOf(site.word) * 1e6 + 1e5 * Math.min(site.answer.overflowHi + site.answer.flushed, 1) - Math.max(-500, Math.min(site.answer.room, 500));
const holds = (row, index) => (row.members ? row.members.some((t) => t.index === index) : row.index === index);

// Columns: head, explanation, how to sort, what to print.
const COLUMNS = [
  { key: "site", head: "Site", value: (t) => t.index },
  { key: "word", head: "Verdict", hint: "sorted from harmful to harmless", value: (t) => badness(t.members ? t.worst : t), cell: (t) => h("span", { class: `verdict-word ${WORD_CLASS[t.word]}` }, t.word, t.members ? h("small", { title: `${t.same} of ${t.members.length} sites alike` }, ` ${t.same}/${t.members.length}`) : null) },
  { key: "overflow", head: "Overflow", hint: "share that rounds beyond the largest finite value; an interval where the histogram cannot tell", value: (t) => t.answer.overflowHi, text: (t) => interval(t.answer.overflowLo, t.answer.overflowHi) },
  { key: "flushed", head: "Flushed", hint: "non-zero values that round to zero", value: (t) => t.answer.flushed, text: (t) => percent(t.answer.flushed) },
  { key: "subnormal", head: "Subnormal", hint: "values that lose bits below the smallest normal", value: (t) => t.answer.subnormal, text: (t) => percent(t.answer.subnormal) },
  { key: "sqnr", head: "SQNR dB", hint: "signal to quantisation noise of what stays in range", value: (t) => -t.answer.sqnr, text: (t) => fixed(t.answer.sqnr) },
  { key: "noise", head: "Loss noise", hint: "standard deviation of the change of one step's loss if this tensor alone were rounded, priced in shadow steps", value: (t) => t.answer.lossNoise, text: (t) => number(t.answer.lossNoise), only: () => sites.some((t) => t.prices) },
  { key: "room", head: "Head-room", hint: "binades from the largest magnitude to the largest finite value", value: (t) => -t.answer.room, text: (t) => (Number.isFinite(t.answer.room) ? fixed(t.answer.room) : MISSING) },
].filter((column) => !column.only || column.only());

const printed = (site) => Object.fromEntries(COLUMNS.filter((c) => c.text).map((c) => [c.key, c.text(site)]));

function sorted(list) {
  const column = COLUMNS.find((c) => c.key === state.sort) || COLUMNS[1];
  const order = (v) => (Number.isNaN(v) ? -Infinity : v);
  const keyed = list.map((t) => [order(column.value(t)), t]);
  keyed.sort((a, b) => (a[0] === b[0] ? a[1].index - b[1].index : (state.down ? b[0] > a[0] : a[0] > b[0]) ? 1 : -1));
  return keyed.map((pair) => pair[1]);
}
