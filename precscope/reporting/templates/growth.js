"use strict";
// The range map's other face: a column per recorded step, darkness by the largest magnitude of the tensor in that step,
// colour by what the chosen format does to it.

function growthSpan(rows) {
  let lo = Infinity, hi = -Infinity;
  for (const row of rows) {
    for (const v of row.logs) {
      if (v === null) continue;
      if (v < lo) lo = v;
      if (v > hi) hi = v;
    }
  }
  return lo <= hi ? [lo, Math.max(hi, lo + 1)] : [0, 1];
}

const stepCell = () => (map.width - map.label - 8) / Math.max(DATA.steps.length, 1);

function drawGrowthRow(context, row, y, state, colors) {
  const cell = stepCell(), height = map.rowHeight, [lo, hi] = map.span;
  row.logs.forEach((v, i) => {
    if (v === null) return;
    const x = map.label + i * cell, what = growthRegion(v, row);
    context.fillStyle = `rgba(${colors[what + "-rgb"]}, ${(0.1 + 0.9 * (v - lo) / (hi - lo)).toFixed(3)})`;
    context.fillRect(x, y + 1.5, Math.max(cell - 0.6, 0.8), height - 3);
    if (what !== "overflow") return;
    context.fillStyle = colors.ink;  // not by colour alone
    context.fillRect(x, y + 1.5, Math.max(cell - 0.6, 0.8), 1.5);
  });
  context.fillStyle = context.strokeStyle = colors.ink;
  for (const i of row.broken) {
    const x = map.label + (i + 0.5) * cell, middle = y + height / 2;
    context.beginPath();
    for (const side of [-1, 1]) {
      context.moveTo(x - 3.5, middle - side * 3.5);
      context.lineTo(x + 3.5, middle + side * 3.5);
    }
    context.stroke();
  }
}

// What the format does to a tensor's largest magnitude 2^v.
function growthRegion(v, row) {
  const edge = edges(state.format, scaleOf(row));
  if (v > edge.max) return "overflow";
  if (v < edge.flush) return "flushed";
  return v < edge.normal ? "subnormal" : "normal";
}

// Above the map: the steps, and what darkness means.
function drawSteps(state, colors) {
  const height = 40, context = prepare(byId("rulers"), map.width, height), cell = stepCell(), [lo, hi] = map.span;
  context.font = `11px ${cssVar("--sans")}`;
  context.textBaseline = "middle";
  context.fillStyle = colors.soft;
  context.fillText("step", 2, height - 11);
  context.textAlign = "center";
  const every = Math.max(1, Math.ceil(DATA.steps.length / Math.max(1, Math.floor((map.width - map.label) / 60))));
  DATA.steps.forEach((step, i) => { if (i % every === 0) context.fillText(String(step), map.label + (i + 0.5) * cell, height - 11); });
  context.textAlign = "left";
  const width = Math.min(180, map.width - map.label - 90), gradient = context.createLinearGradient(map.label, 0, map.label + width, 0);
  gradient.addColorStop(0, `rgba(${colors["normal-rgb"]}, 0.1)`);
  gradient.addColorStop(1, `rgba(${colors["normal-rgb"]}, 1)`);
  context.fillText("largest magnitude", 2, 9);
  context.fillStyle = gradient;
  context.fillRect(map.label, 3, width, 11);
  context.fillStyle = colors.soft;
  context.fillText(`${pow2(Math.floor(lo))} to ${pow2(Math.ceil(hi))}`, map.label + width + 7, 9);
}

function growthTip(row, x) {
  const i = Math.floor((x - map.label) / stepCell()), v = row.logs[i];
  if (i < 0 || i >= DATA.steps.length) return `${row.name} · amax ${number(row.amax)}`;
  const value = row.broken.includes(i) ? "inf or NaN" : v === null || v === undefined ? "nothing recorded" : number(2 ** v);
  return `${row.name} · step ${DATA.steps[i]}${DATA.steps[i + 1] > DATA.steps[i] + 1 ? " on" : ""}: ${value}`;
}
