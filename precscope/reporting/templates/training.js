"use strict";
// Training runs side by side: losses with their spread, differences, loss scale, throughput, and what happened when.

const known = (v) => v !== null && v !== undefined;

function courseSeries() {
  const styles = runStyles(DATA.courses);
  return DATA.courses.map((c, i) => ({ course: c, name: c.run, color: `var(--run${styles[i][0]})`, dash: styles[i][1] }));
}

function drawTraining() {
  if (!DATA.courses.length || !byId("loss-chart")) return;
  const all = courseSeries();
  byId("runs-key").replaceChildren(...all.map((one) => h("li", {}, s("svg", { viewBox: "0 0 26 8", "aria-hidden": "true" }, s("line", { x1: 0, x2: 26, y1: 4, y2: 4, stroke: one.color, "stroke-width": 2.2, "stroke-dasharray": one.dash })), one.name, one.course.seeds > 1 ? ` (${one.course.seeds} seeds)` : "")));
  const under = (one) => (one.name === DATA.baseline ? { width: 5, opacity: 0.3 } : {});
  const losses = all.map((one) => ({ ...one, ...under(one), points: one.course.losses, dots: one.course.heldOut.length > 1 ? one.course.heldOut : [] }));
  chart("loss", losses, { height: 230 }, "Training loss by step");
  chart("difference", all.filter((one) => one.course.difference.length).map((one) => ({ ...one, points: one.course.difference })), { height: 230, lines: [{ y: 0, include: true }, ...margins()] }, `Difference of the training loss from ${DATA.baseline}`);
  const scaled = all.filter((one) => one.course.scale.length).map((one) => ({ ...one, points: stairs(one.course.scale.map(([t, v]) => [t, v > 0 ? Math.log2(v) : null])) }));
  chart("scale", scaled, { height: 150, yText: (v) => (Number.isInteger(v) ? pow2(v) : ""), ticks: (lo, hi, n) => niceTicks(lo, hi, n).filter(Number.isInteger), valueText: (v) => pow2(Math.round(v)) }, "Loss scale by step");
  chart("rate", all.filter((one) => one.course.rate.length).map((one) => ({ ...one, points: one.course.rate })), { height: 150, floor: 0, valueText: (v) => `${number(v)}/s` }, "Steps per second");
  drawLanes(all);
}

// What a comparison takes for no difference; drawn where the axis has room for it.
const margins = () => (DATA.margin ? [-1, 1].map((side) => ({ y: side * DATA.margin.bound, text: `margin ${percent(DATA.margin.share)}%` })) : []);

const stairs = (points) => points.flatMap(([t, v], i) => (i ? [[t, points[i - 1][1]], [t, v]] : [[t, v]]));

function chart(name, series, options, title) {
  const svg = byId(`${name}-chart`), figure = svg.closest("figure");
  figure.hidden = !series.length;
  if (!series.length) return;
  const text = options.valueText || number;
  svg.setAttribute("aria-label", `${title}: ` + series.map((one) => {
    const seen = one.points.filter((p) => known(p[1]));
    return seen.length ? `${one.name} from ${text(seen[0][1])} at step ${seen[0][0]} to ${text(seen[seen.length - 1][1])} at step ${seen[seen.length - 1][0]}` : `${one.name} nothing finite`;
  }).join("; ") + ". All figures are in the table view of the data below.");
  lineChart(svg, series, { ...options, readout: byId(`${name}-readout`) });
}

// A lane per run: skipped and non-finite steps, and what its guard did; shapes differ, not colours alone.
const MARKS = { skipped: ["skipped step", "var(--care)", "M-4,-4h8l-4,8z"], nonfinite: ["inf or NaN", "var(--bad)", "M-4,-4l8,8m0,-8l-8,8"], event: ["guard", "var(--accent)", "M0,-5l5,5l-5,5l-5,-5z"] };

function drawLanes(all) {
  const svg = byId("lanes-chart"), lanes = all.filter(({ course: c }) => c.skipped.length + c.nonfinite.length + c.events.length);
  svg.closest("figure").hidden = !lanes.length;
  if (!lanes.length) return;
  const width = svg.clientWidth || 320, row = 30, height = lanes.length * row + 24, left = Math.min(120, width * 0.26), right = 12;
  const last = Math.max(1, ...all.flatMap(({ course: c }) => c.losses.map((p) => p[0])));
  const x = (step) => left + step / last * (width - left - right);
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  lanes.forEach(({ name, course }, i) => {
    const y = i * row + row / 2 + 2;
    svg.append(s("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y }), s("text", { x: 0, y: y + 4 }, shorten(name, Math.floor(left / 7))));
    const marks = [...course.skipped.map((t) => ["skipped", t, ""]), ...course.nonfinite.map((t) => ["nonfinite", t, ""]), ...course.events.map((e) => ["event", e[0], `: ${e[1]}, ${e[2]}${e[3] ? `, ${e[3]}` : ""}`])];
    const drawn = new Set();
    for (const [kind, step, text] of marks) {
      const place = `${kind} ${Math.round(x(step))}`;
      if (drawn.has(place)) continue;
      drawn.add(place);
      const [said, color, path] = MARKS[kind], lift = kind === "event" ? -5 : kind === "skipped" ? 5 : 0;
      svg.append(s("path", { d: path, transform: `translate(${x(step).toFixed(1)},${y + lift})`, fill: kind === "nonfinite" ? "none" : color, stroke: color, "stroke-width": kind === "nonfinite" ? 1.8 : 0 }, s("title", {}, `step ${step}: ${said}${text}`)));
    }
  });
  for (const tick of niceTicks(0, last, width / 90).filter(Number.isInteger)) svg.append(s("text", { x: x(tick), y: height - 5, "text-anchor": "middle" }, String(tick)));
  svg.setAttribute("aria-label", "What happened when: " + lanes.map(({ name, course: c }) => `${name}: ${c.skipped.length} skipped, ${c.nonfinite.length} non-finite steps, ${c.events.length} events of the guard`).join("; "));
}
