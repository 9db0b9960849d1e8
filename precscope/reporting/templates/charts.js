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

// series: [{name, color, dash, width, points: [[x, y], ...]}]; y null breaks the line.
// options: height, yText, xTicks, zero (draw y = 0), lines: [{y, text}], readout (element), marks: [x, ...].
function lineChart(svg, series, options) {
  const width = svg.clientWidth || 320, height = options.height || 200;
  const values = series.flatMap((one) => one.points.filter((p) => p[1] !== null).map((p) => p[1]));
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  if (!values.length) {
    svg.append(s("text", { x: 8, y: 20 }, "nothing to draw"));
    return;
  }
  const xs = series.flatMap((one) => one.points.map((p) => p[0]));
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  let [y0, y1] = options.range || [Math.min(...values), Math.max(...values)];
  for (const line of options.lines || []) if (line.include) { y0 = Math.min(y0, line.y); y1 = Math.max(y1, line.y); }
  const pad = (y1 - y0 || Math.abs(y1) || 1) * 0.06;
  y0 -= pad;
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
    let path = "", pen = "M";
    for (const [px, py] of one.points) {
      if (py === null) { pen = "M"; continue; }
      path += `${pen}${x(px).toFixed(1)},${y(py).toFixed(1)}`;
      pen = "L";
    }
    svg.append(s("path", { d: path, fill: "none", stroke: one.color, "stroke-width": one.width || 1.6, "stroke-opacity": one.opacity || 1, "stroke-dasharray": one.dash || "", "stroke-linejoin": "round" }));
    if (one.points.length === 1) svg.append(s("circle", { cx: x(one.points[0][0]), cy: y(one.points[0][1]), r: 3, fill: one.color }));
  }
  if (options.readout) follow(svg, series, { x, x0, x1, left, right, width, height, bottom, top }, options);
}

function follow(svg, series, box, options) {
  const cursor = s("line", { class: "axis", y1: box.top, y2: box.height - box.bottom, visibility: "hidden" });
  svg.append(cursor);
  svg.onpointermove = (event) => {
    const bounds = svg.getBoundingClientRect();
    const at = (event.clientX - bounds.left) / bounds.width * box.width;
    const step = box.x0 + (at - box.left) / (box.width - box.left - box.right) * (box.x1 - box.x0);
    const near = series.map((one) => one.points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a)));
    cursor.setAttribute("x1", box.x(near[0][0]));
    cursor.setAttribute("x2", box.x(near[0][0]));
    cursor.setAttribute("visibility", "visible");
    options.readout.textContent = `step ${near[0][0]}: ` + series.map((one, i) => `${one.name} ${number(near[i][1])}`).join(", ");
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
  for (const [e, text] of [[fmt.emin - fmt.p - k, "subnormal"], [fmt.emin - k, "normal"], [Math.log2(fmt.max) - k, "max"]]) {
    if (e < first || e > last) continue;
    svg.append(s("line", { x1: x(e), x2: x(e), y1: top - 4, y2: height - bottom, stroke: "var(--soft)", "stroke-dasharray": "2 2" }));
    svg.append(s("text", { x: Math.min(Math.max(x(e), 22), width - 22), y: 8, "text-anchor": "middle" }, text));
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

// Mean over a twentieth of the curve around each point: single steps differ by rounding noise alone.
function runningMean(points) {
  const half = Math.floor(points.length / 40);
  return points.map(([x, y], i) => {
    if (y === null) return [x, null];
    const near = points.slice(Math.max(i - half, 0), i + half + 1).filter((p) => p[1] !== null);
    return [x, near.reduce((sum, p) => sum + p[1], 0) / near.length];
  });
}

function drawTraining() {
  if (!DATA.curves.length || !byId("loss-chart")) return;
  const styles = runStyles(DATA.curves);
  const series = DATA.curves.map((c, i) => ({ name: c.run, color: `var(--run${styles[i][0]})`, dash: styles[i][1], points: c.steps.map((t, j) => [t, c.losses[j]]) }));
  byId("runs-key").replaceChildren(...series.map((one) => h("li", {}, s("svg", { viewBox: "0 0 26 8", "aria-hidden": "true" }, s("line", { x1: 0, x2: 26, y1: 4, y2: 4, stroke: one.color, "stroke-width": 2.2, "stroke-dasharray": one.dash })), one.name)));
  const under = series.map((one) => (one.name === DATA.baseline ? { ...one, width: 5, opacity: 0.3 } : one));
  lineChart(byId("loss-chart"), under, { height: 230, readout: byId("loss-readout") });
  const base = new Map((series.find((one) => one.name === DATA.baseline) || series[0]).points);
  const difference = series.filter((one) => one.name !== DATA.baseline).map((one) => ({
    ...one, points: runningMean(one.points.map(([t, v]) => [t, v === null || (base.get(t) ?? null) === null ? null : v - base.get(t)])),
  }));
  byId("difference-chart").closest("figure").hidden = !difference.length;
  if (difference.length) lineChart(byId("difference-chart"), difference, { height: 230, lines: [{ y: 0, include: true }], readout: byId("difference-readout") });
}
