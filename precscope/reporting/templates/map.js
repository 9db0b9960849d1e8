"use strict";
// The range map: a row per site, a column per binade, darkness by the logarithm of the share, colour by what the chosen
// format does to the binade. Only the visible rows are drawn, whatever the model's size.

const RULERS = ["fp16", "bf16", "e4m3", "e5m2"];
const map = { rows: [], lo: -30, hi: 20, span: [0, 1], rowHeight: 16, label: 200, printing: false };
const growing = () => state.map === "steps" && DATA.steps.length > 0;

function mapColors() {
  return Object.fromEntries(["ink", "soft", "faint", "line", "panel", "wash", "accent", "normal-rgb", "subnormal-rgb", "flushed-rgb", "overflow-rgb"].map((n) => [n, cssVar(`--${n}`)]));
}

function layoutMap(sites) {
  map.rows = sites;
  map.lo = -28;
  map.hi = 18;
  for (const site of sites) {
    if (!site.counts.length) continue;
    map.lo = Math.min(map.lo, site.lo - 1);
    map.hi = Math.max(map.hi, site.lo + site.counts.length + 1);
  }
  map.span = growthSpan(sites);
  map.rowHeight = sites.length > 150 ? 13 : 17;
  byId("map-sizer").style.height = `${Math.max(sites.length, 1) * map.rowHeight}px`;
  const scroller = byId("map-scroller");
  scroller.scrollTop = Math.min(scroller.scrollTop, sites.length * map.rowHeight);
}

function mapGeometry() {
  const width = byId("map-sizer").clientWidth;
  map.label = Math.round(Math.min(width * 0.32, 215));
  map.width = width;
  map.cell = (width - map.label - 8) / (map.hi - map.lo);
  map.x = (e) => map.label + (e - map.lo) * map.cell;
}

function drawMap(state) {
  if (!byId("map")) return;
  mapGeometry();
  const colors = mapColors();
  if (growing()) drawSteps(state, colors);
  else drawRulers(state, colors);
  const scroller = byId("map-scroller"), canvas = byId("map");
  const total = Math.max(map.rows.length, 1) * map.rowHeight;
  const limit = map.printing ? Math.min(total, 12000) : Math.min(total, scroller.clientHeight || 600);
  const from = map.printing ? 0 : scroller.scrollTop;
  const context = prepare(canvas, map.width, limit);
  context.font = `11px ${cssVar("--sans")}`;
  context.textBaseline = "middle";
  if (!growing()) drawRegions(context, state, colors, limit);
  const start = Math.floor(from / map.rowHeight), end = Math.min(map.rows.length, Math.ceil((from + limit) / map.rowHeight));
  for (let i = start; i < end; i++) drawRow(context, map.rows[i], i * map.rowHeight - from, state, colors);
  if (!growing()) drawEdges(context, state, colors, limit);
}

function drawRow(context, site, y, state, colors) {
  const height = map.rowHeight, chosen = holds(site, state.selected), fmt = state.format;
  if (chosen) {
    context.fillStyle = `rgba(128, 140, 155, 0.22)`;
    context.fillRect(0, y, map.width, height);
  }
  context.fillStyle = chosen ? colors.ink : colors.soft;
  context.fillText(fitted(context, state.allRoles ? site.name : site.short, map.label - 10), 2, y + height / 2 + 0.5);
  if (growing()) return void drawGrowthRow(context, site, y, state, colors);
  const total = site.finite, k = scaleOf(site);
  for (let j = 0; j < site.counts.length; j++) {
    if (!site.counts[j]) continue;
    const e = site.lo + j, depth = Math.min(1, Math.max(0, 1 + Math.log10(site.counts[j] / total) / 6));
    context.fillStyle = `rgba(${colors[region(site, fmt, k, e) + "-rgb"]}, ${(0.13 + 0.87 * depth ** 1.4).toFixed(3)})`;
    context.fillRect(map.x(e), y + 1.5, Math.max(map.cell - 0.6, 0.8), height - 3);
  }
  if (site.amax > 0) {
    const least = Math.log2(site.least || site.amax), most = Math.log2(site.amax);
    context.fillStyle = colors.ink;
    context.globalAlpha = 0.75;
    context.fillRect(map.x(least), y + height / 2 - 0.5, map.x(most) - map.x(least), 1);
    context.globalAlpha = 1;
    context.fillRect(map.x(most) - 0.75, y + 2.5, 1.5, height - 5);
  }
}

const fits = new Map();

function fitted(context, text, width) {
  const key = `${Math.round(width)} ${text}`;
  if (!fits.has(key)) {
    let length = text.length;
    while (length > 4 && context.measureText(shorten(text, length)).width > width) length--;
    fits.set(key, shorten(text, length));
  }
  return fits.get(key);
}

// Where the chosen format ends, in recorded (unscaled) exponents.
const edges = (fmt, k) => ({ flush: fmt.emin - fmt.p - 1 - k, subnormal: fmt.emin - fmt.p - k, normal: fmt.emin - k, max: Math.log2(fmt.max) - k });

const clampX = (e) => Math.min(Math.max(map.x(e), map.label), map.x(map.hi));

function drawRegions(context, state, colors, height) {
  if (state.own) return;
  const edge = edges(state.format, state.k), left = clampX(edge.flush), right = clampX(edge.max);
  hatch(context, map.label, left, height, colors["flushed-rgb"], 1);
  hatch(context, right, map.x(map.hi), height, colors["overflow-rgb"], -1);
}

// lean: 1 for stripes that rise to the right, -1 for those that fall.
function hatch(context, x0, x1, height, rgb, lean) {
  if (x1 - x0 < 1) return;
  context.fillStyle = `rgba(${rgb}, 0.06)`;
  context.fillRect(x0, 0, x1 - x0, height);
  stripe(context, x0, x1, height, `rgba(${rgb}, 0.13)`, lean, 9);
}

function stripe(context, x0, x1, height, color, lean, every) {
  if (x1 - x0 < 1) return;
  context.save();
  context.beginPath();
  context.rect(x0, 0, x1 - x0, height);
  context.clip();
  context.strokeStyle = color;
  context.lineWidth = 1;
  context.setLineDash([]);
  context.beginPath();
  for (let x = x0 - height; x < x1; x += every) {
    context.moveTo(x, lean > 0 ? height : 0);
    context.lineTo(x + height, lean > 0 ? 0 : height);
  }
  context.stroke();
  context.restore();
}

function drawEdges(context, state, colors, height) {
  if (state.own) return;  // a format ends elsewhere in every row
  const edge = edges(state.format, state.k);
  context.globalAlpha = 0.5;  // what is lost is striped, not told by its colour alone
  stripe(context, map.label, clampX(edge.flush), height, colors.panel, 1, 4.5);
  stripe(context, clampX(edge.max), map.x(map.hi), height, colors.panel, -1, 4.5);
  context.strokeStyle = colors.faint;
  context.globalAlpha = 0.55;
  for (const name of RULERS.filter((n) => n !== state.format.name)) {  // where the other formats begin and end
    const other = edges(FORMATS[name], state.k);
    for (const [e, dash] of [[other.max, [1, 4]], [other.subnormal, [1, 8]]]) {
      if (e < map.lo || e > map.hi) continue;
      context.setLineDash(dash);
      context.beginPath();
      context.moveTo(map.x(e), 0);
      context.lineTo(map.x(e), height);
      context.stroke();
    }
  }
  context.globalAlpha = 1;
  for (const [e, dash] of [[edge.max, []], [edge.normal, [4, 3]], [edge.subnormal, [1.5, 2.5]]]) {
    if (e < map.lo || e > map.hi) continue;
    context.strokeStyle = colors.soft;
    context.setLineDash(dash);
    context.beginPath();
    context.moveTo(map.x(e), 0);
    context.lineTo(map.x(e), height);
    context.stroke();
  }
  context.setLineDash([]);
}

function drawRulers(state, colors) {
  const names = RULERS.includes(state.format.name) ? RULERS : [...RULERS, state.format.name];
  const row = 18, height = names.length * row + 24, context = prepare(byId("rulers"), map.width, height);
  context.textBaseline = "middle";
  names.forEach((name, i) => drawRuler(context, FORMATS[name], i * row + 9, state, colors));
  context.font = `11px ${cssVar("--sans")}`;
  context.fillStyle = colors.soft;
  context.textAlign = "center";
  const every = [5, 10, 20, 40].find((step) => step * map.cell > 46) || 40;
  for (let e = Math.ceil(map.lo / every) * every; e <= map.hi; e += every) {
    if (map.x(e) < map.width - 16) context.fillText(e === 0 ? "1" : pow2(e), map.x(e), height - 11);
    context.fillRect(map.x(e), height - 3, 1, 3);
  }
  context.textAlign = "left";
}

// One format: a thick line over its normal range, a thin one over its subnormals, its ends in figures.
function drawRuler(context, fmt, y, state, colors) {
  const edge = edges(fmt, state.own ? 0 : state.k), chosen = fmt.name === state.format.name;
  const color = chosen ? colors.accent : colors.faint;
  context.font = `${chosen ? "600 " : ""}11px ${cssVar("--sans")}`;
  context.fillStyle = chosen ? colors.accent : colors.soft;
  context.fillText(fmt.name, 2, y + 0.5);
  context.fillStyle = color;
  const left = clampX(edge.subnormal), middle = clampX(edge.normal), right = clampX(edge.max);
  context.fillRect(left, y - 1, middle - left, 2);
  context.fillRect(middle, y - 3, Math.max(right - middle, 0), 6);
  if (edge.normal >= map.lo && edge.normal <= map.hi) context.fillRect(middle - 1, y - 5, 2, 10);
  context.font = `10.5px ${cssVar("--sans")}`;
  context.fillStyle = chosen ? colors.ink : colors.soft;
  const most = number(fmt.max), least = pow2(fmt.emin - fmt.p);
  if (edge.max <= map.hi && edge.max >= map.lo && right + context.measureText(most).width + 8 < map.width) context.fillText(most, right + 5, y + 0.5);
  if (edge.subnormal >= map.lo && edge.subnormal <= map.hi) {
    const width = context.measureText(least).width;
    if (left - width - 5 > map.label) context.fillText(least, left - width - 5, y + 0.5);
  }
  if (edge.max > map.hi) arrow(context, right, y, 1, color);
  if (edge.subnormal < map.lo) arrow(context, left, y, -1, color);
}

function arrow(context, x, y, direction, color) {
  context.fillStyle = color;
  context.beginPath();
  context.moveTo(x + direction * 6, y);
  context.lineTo(x, y - 6);
  context.lineTo(x, y + 6);
  context.fill();
}

function describeMap(state) {
  const over = map.rows.filter((site) => site.answer.overflowHi > 0).length;
  const flushed = map.rows.filter((site) => site.answer.flushed > DATA.limits.flushed).length;
  const what = map.rows.some((site) => site.members) ? "rows of tensors alike" : "tensors";
  return `${map.rows.length} ${what} in ${state.format.name} at ${state.own ? "a scale of its own each" : `scale ${pow2(state.k)}`}: ${over} overflow or may, ${flushed} flush more than ${percent(DATA.limits.flushed)}% to zero. The same figures are in the table below.${sites[state.selected] ? ` Chosen: ${sites[state.selected].name}, ${sites[state.selected].word || "not asked"}.` : ""}`;
}

function watchMap(state, choose) {
  const scroller = byId("map-scroller"), canvas = byId("map"), tip = byId("tip");
  const siteAt = (event) => map.rows[Math.floor((event.clientY - canvas.getBoundingClientRect().top + scroller.scrollTop) / map.rowHeight)];
  scroller.addEventListener("scroll", () => requestAnimationFrame(() => drawMap(state)), { passive: true });
  canvas.addEventListener("click", (event) => siteAt(event) && choose(siteAt(event).index, "map"));
  canvas.addEventListener("pointermove", (event) => {
    const site = siteAt(event);
    if (!site) return void (tip.hidden = true);
    const e = Math.floor(map.lo + (event.clientX - canvas.getBoundingClientRect().left - map.label) / map.cell), n = site.counts[e - site.lo];
    tip.textContent = growing() ? growthTip(site, event.clientX - canvas.getBoundingClientRect().left) : site.name + (e >= map.lo && n ? ` · ${percent(n / site.finite)}% from ${pow2(e)} to ${pow2(e + 1)}` : ` · amax ${number(site.amax)}`);
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${event.clientY + 16}px`;
  });
  canvas.addEventListener("pointerleave", () => (tip.hidden = true));
  scroller.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 12, PageUp: -12, Home: -1e9, End: 1e9 }[event.key];
    if (step === undefined || !map.rows.length) return;
    event.preventDefault();
    const now = map.rows.findIndex((site) => holds(site, state.selected));
    const next = Math.min(Math.max(now + step, 0), map.rows.length - 1);
    const y = next * map.rowHeight;
    if (y < scroller.scrollTop) scroller.scrollTop = y;
    if (y + map.rowHeight > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = y + map.rowHeight - scroller.clientHeight;
    choose(map.rows[next].index, "map");
  });
}
