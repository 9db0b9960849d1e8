"use strict";
// Small SVG charts: lines over steps, and the histogram of one site.

// A run's colour and dashes: by its precision where that is known, so that they agree with the plan's colours.
const RUN_STYLES = { fp32: [0, ""], fp16: [1, "6 3"], bf16: [2, "2 3"], plan: [3, ""], e4m3: [4, "8 3 2 3"], e5m2: [5, "4 4"], tf32: [6, "1 4"] };

function runStyles(curves) {
  const styles = curves.map((c) => RUN_STYLES[c.precision]), words = curves.map((c) => c.precision);
  if (styles.every(Boolean) && new Set(words).size === words.length) return styles;
  return curves.map((c, i) => Object.values(RUN_STYLES)[i % 7]);
}

function niceTicks(lo, hi, count) {
  const raw = (hi - lo) / Math.max(count, 1), unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * ([1, 2, 5, 10].find((m) => m * unit >= raw) || 10);
  const ticks = [];
  for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi + 1e-9 * step; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

// series: [{name, color, dash, width, points: [[x, y, lo, hi], ...], dots: [[x, y], ...]}]; y null breaks the line, lo and
// hi, where known, make a band. options: height, yText and valueText (of ticks, of values read out), ticks, floor (a
// value that the axis reaches), range, lines: [{y, text, include}], readout (element), marks: [x, ...].
function lineChart(svg, series, options) {
  const width = svg.clientWidth || 320, height = options.height || 200;
  const values = series.flatMap((one) => [...one.points, ...(one.dots || [])].flatMap((p) => p.slice(1)).filter((v) => v !== null));
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  if (!values.length) {
    svg.append(s("text", { x: 8, y: 20 }, "nothing to draw"));
    return;
  }
  const xs = series.flatMap((one) => one.points.map((p) => p[0]));
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  let [y0, y1] = options.range || [Math.min(...values), Math.max(...values)];
  if (options.floor !== undefined) y0 = Math.min(y0, options.floor);
  for (const line of options.lines || []) if (line.include) { y0 = Math.min(y0, line.y); y1 = Math.max(y1, line.y); }
  const pad = (y1 - y0 || Math.abs(y1) || 1) * 0.06;
  if (y0 !== options.floor) y0 -= pad;
  y1 += pad;
  const left = 46, right = 10, top = 8, bottom = 22;
  const x = (v) => left + (v - x0) / (x1 - x0) * (width - left - right);
  const y = (v) => top + (y1 - v) / (y1 - y0) * (height - top - bottom);
  const yText = options.yText || number;
  for (const tick of (options.ticks || niceTicks)(y0, y1, height / 45)) {
    svg.append(s("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
    svg.append(s("text", { x: left - 6, y: y(tick) + 3.5, "text-anchor": "end" }, yText(tick)));
  }
  for (const tick of niceTicks(x0, x1, width / 90).filter(Number.isInteger)) {
    svg.append(s("text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, String(tick)));
  }
  for (const line of options.lines || []) {
    if (line.y < y0 || line.y > y1) continue;
    svg.append(s("line", { x1: left, x2: width - right, y1: y(line.y), y2: y(line.y), stroke: line.color || "var(--faint)", "stroke-dasharray": "3 3" }));
    if (line.text) svg.append(s("text", { x: width - right, y: y(line.y) - 4, "text-anchor": "end" }, line.text));
  }
  for (const mark of options.marks || []) {
    svg.append(s("path", { d: `M${x(mark) - 4},${height - bottom} l4,-7 l4,7 z`, fill: "var(--bad)" }, s("title", {}, "inf or NaN here")));
  }
  for (const one of series) {
    drawBand(svg, one, x, y);
    for (const [px, py] of one.dots || []) svg.append(s("circle", { cx: x(px), cy: y(py), r: 3, fill: "var(--panel)", stroke: one.color, "stroke-width": 1.6 }, s("title", {}, `${one.name}, held-out loss at step ${px}: ${number(py)}`)));
    let path = "", pen = "M";
    for (const [px, py] of one.points) {
      if (py === null || py === undefined) { pen = "M"; continue; }
      path += `${pen}${x(px).toFixed(1)},${y(py).toFixed(1)}`;
      pen = "L";
    }
    svg.append(s("path", { d: path, fill: "none", stroke: one.color, "stroke-width": one.width || 1.6, "stroke-opacity": one.opacity || 1, "stroke-dasharray": one.dash || "", "stroke-linejoin": "round" }));
    if (one.points.length === 1) svg.append(s("circle", { cx: x(one.points[0][0]), cy: y(one.points[0][1]), r: 3, fill: one.color }));
  }
  if (options.readout) follow(svg, series, { x, x0, x1, left, right, width, height, bottom, top }, options);
}

// The area between lower and upper values, where both are known.
function drawBand(svg, one, x, y) {
  const known = one.points.filter((p) => p[2] !== undefined && p[2] !== null && p[3] !== undefined && p[3] !== null);
  if (known.length < 2) return;
  const upper = known.map((p) => `${x(p[0]).toFixed(1)},${y(p[3]).toFixed(1)}`), lower = known.map((p) => `${x(p[0]).toFixed(1)},${y(p[2]).toFixed(1)}`);
  svg.append(s("path", { d: `M${upper.join("L")}L${lower.reverse().join("L")}Z`, fill: one.color, "fill-opacity": 0.16, stroke: "none" }));
}

function follow(svg, series, box, options) {
  const cursor = s("line", { class: "axis", y1: box.top, y2: box.height - box.bottom, visibility: "hidden" });
  const text = options.valueText || number;
  const valueText = ([, v, lo, hi]) => (v === null || v === undefined ? MISSING : text(v)) + (known(lo) && known(hi) ? ` (${text(lo)} to ${text(hi)})` : "");
  svg.append(cursor);
  svg.onpointermove = (event) => {
    const bounds = svg.getBoundingClientRect();
    const at = (event.clientX - bounds.left) / bounds.width * box.width;
    const step = box.x0 + (at - box.left) / (box.width - box.left - box.right) * (box.x1 - box.x0);
    const near = series.map((one) => one.points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a)));
    cursor.setAttribute("x1", box.x(near[0][0]));
    cursor.setAttribute("x2", box.x(near[0][0]));
    cursor.setAttribute("visibility", "visible");
    options.readout.textContent = `step ${near[0][0]}: ` + series.map((one, i) => `${one.name} ${valueText(near[i])}`).join(", ");
  };
  svg.onpointerleave = () => {
    cursor.setAttribute("visibility", "hidden");
    options.readout.textContent = "";
  };
}

// Bars per binade, height by the logarithm of the share, coloured by what the format does to them.
function siteHistogram(svg, site, fmt, k) {
  const width = svg.clientWidth || 320, height = 128, top = 14, bottom = 22;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const n = site.counts.length, total = site.counts.reduce((a, b) => a + b, 0);
  if (!total) {
    svg.append(s("text", { x: 0, y: 24 }, "only zeros or non-finite values"));
    return;
  }
  const first = Math.min(site.lo, Math.max(site.lo - 6, fmt.emin - k - fmt.p - 1)) - 1;
  const last = Math.max(site.lo + n, Math.min(site.lo + n + 6, fmt.emax - k + 1)) + 1;
  const cell = width / (last - first), x = (e) => (e - first) * cell, floor = -7;
  const y = (share) => top + (1 - Math.max(0, (Math.log10(share) - floor) / -floor)) * (height - top - bottom);
  site.counts.forEach((count, j) => {
    if (!count) return;
    const e = site.lo + j, edge = y(count / total);
    const bar = { x: x(e) + 0.5, width: Math.max(cell - 1, 1), y: Math.min(edge, height - bottom - 1), height: Math.max(height - bottom - edge, 1), fill: `var(--${region(site, fmt, k, e)})` };
    svg.append(s("rect", bar, s("title", {}, `${pow2(e)}: ${percent(count / total)}%`)));
  });
  svg.append(s("line", { class: "axis", x1: 0, x2: width, y1: height - bottom, y2: height - bottom }));
  let taken = -1e3;  // where the last word ends: words do not run into each other
  for (const [e, text] of [[fmt.emin - fmt.p - k, "subnormal"], [fmt.emin - k, "normal"], [Math.log2(fmt.max) - k, "max"]]) {
    if (e < first || e > last) continue;
    svg.append(s("line", { x1: x(e), x2: x(e), y1: top - 4, y2: height - bottom, stroke: "var(--soft)", "stroke-dasharray": "2 2" }));
    const half = text.length * 3, at = Math.min(Math.max(x(e), half), width - half);
    if (at - half < taken + 4) continue;
    svg.append(s("text", { x: at, y: 8, "text-anchor": "middle" }, text));
    taken = at + half;
  }
  const every = Math.ceil((last - first) / 6 / 5) * 5;
  for (let e = Math.ceil(first / every) * every; e <= last; e += every) {
    const at = x(e), anchor = at < 18 ? "start" : at > width - 18 ? "end" : "middle";
    svg.append(s("text", { x: at, y: height - 6, "text-anchor": anchor }, pow2(e)));
  }
}

// What the format does to binade e of a site: a colour's name. The format's top binade overflows in part: it counts
// where no value lies beyond it.
function region(site, fmt, k, e) {
  const scaled = e + k;
  if (scaled > fmt.emax) return "overflow";
  if (scaled === fmt.emax && binadeOf(site.amax) === e && overflows(site.amax, fmt, k)) return "overflow";
  if (scaled < fmt.emin - fmt.p - 1) return "flushed";
  return scaled < fmt.emin ? "subnormal" : "normal";
}
