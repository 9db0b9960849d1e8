"use strict";
// What rounding to a format does to a tensor, answered from its exponent histogram.
// The same formulas, in the same order, as precscope/histogram.py: rounding_table and answer.

const EXP_LO = DATA.bins.lo, BINS = DATA.bins.count, CONTINUOUS = 200;
const floatBits = new DataView(new ArrayBuffer(8));

// Exact exponent e of a positive finite double, 2^e <= x < 2^(e+1).
function binadeOf(x) {
  floatBits.setFloat64(0, x);
  const raw = (floatBits.getUint32(0) >>> 20) & 0x7ff;
  return raw ? raw - 1023 : binadeOf(x * 2 ** 64) - 64;
}

// x * 2^k, also where 2^k alone leaves the range of a double.
function ldexp(x, k) {
  for (; k > 1000; k -= 1000) x *= 2 ** 1000;
  for (; k < -1000; k += 1000) x *= 2 ** -1000;
  return x * 2 ** k;
}

function roundHalfEven(x) {
  const floor = Math.floor(x), rest = x - floor;
  if (rest !== 0.5) return Math.round(x);
  return floor % 2 === 0 ? floor : floor + 1;
}

const meanSquare = (points) => 7 / 3 - 1.5 / points + 1 / (6 * points * points);

const tables = new Map();

function roundingTable(fmt, k, source, sourceExponent) {
  const key = `${fmt.name} ${k} ${source ? source.name : ""} ${sourceExponent}`;
  let table = tables.get(key);
  if (table) return table;
  const columns = ["overflows", "top", "flushed", "subnormal", "error", "flushError", "energy"];
  table = Object.fromEntries(columns.map((name) => [name, new Float64Array(BINS)]));
  const lowest = fmt.emin - fmt.p - 1;
  for (let i = 0; i < BINS; i++) {
    const e = EXP_LO + i, binade = e + k;
    const ulp = Math.max(binade, fmt.emin) - fmt.p;
    let step = binade - CONTINUOUS;
    if (source) {
      const moved = sourceExponent + k;
      step = Math.min(Math.max(binade - moved, source.emin) - source.p + moved, binade);
    }
    const points = 2 ** (binade - step), finer = 2 ** -Math.max(ulp - step, 0);
    const below = binade < lowest, isLowest = binade === lowest, inRange = binade <= fmt.emax;
    const uniform = isLowest ? (1 + 3 * finer + 2 * finer ** 2) / 12 : finer < 1 ? (1 + 2 * finer ** 2) / 12 : 0;
    const energy = ldexp(meanSquare(points), 2 * e), tie = isLowest ? 1 / points : 0;
    table.overflows[i] = inRange ? 0 : 1;
    table.top[i] = binade === fmt.emax ? 1 : 0;
    table.flushed[i] = below ? 1 : tie;
    table.subnormal[i] = binade >= lowest && binade < fmt.emin ? 1 - tie : 0;
    table.error[i] = inRange ? (below ? energy : ldexp(uniform, 2 * Math.min(ulp - k, e + 1))) : 0;
    table.flushError[i] = below ? energy : 0;
    table.energy[i] = energy;
  }
  table.firstCell = source && lowest - k - sourceExponent >= source.emin ? 0.75 : 1;
  if (tables.size > 4000) tables.clear();
  tables.set(key, table);
  return table;
}

function overflows(magnitude, fmt, k) {
  const scaled = ldexp(magnitude, k);
  return Number.isFinite(magnitude) && (fmt.atMidpoint ? scaled >= fmt.overflowFrom : scaled > fmt.overflowFrom);
}

// Largest k for which a tensor times 2^k does not overflow: advice/loss_scale.py, largest_scale.
function ownScale(amax, fmt) {
  if (!(amax > 0) || !Number.isFinite(amax)) return 0;
  const exponent = binadeOf(amax) + 1, k = fmt.emax + 1 - exponent;
  return overflows(ldexp(amax, -exponent), fmt, fmt.emax + 1) ? k - 1 : k;
}

// Whether one magnitude is flushed, and its squared rounding error in units before the scale.
function roundExactly(magnitude, fmt, k) {
  const ulp = Math.max((magnitude > 0 ? binadeOf(magnitude) : -1) + k, fmt.emin) - fmt.p - k;
  const steps = ldexp(magnitude, -ulp), rounded = roundHalfEven(steps);
  return { lost: rounded === 0, squared: ldexp(steps - rounded, ulp) ** 2 };
}

// Values beyond one in N that lie at exactly half of the smallest subnormal and are flushed there.
function moreTies(site, fmt, k, t) {
  const column = fmt.emin - fmt.p - 1 - k - EXP_LO, count = (i) => site.counts[i - (site.lo - EXP_LO)] || 0;
  if (column <= 0 || column >= BINS - 1 || t.flushed[column] < 1e-6) return 0;
  const points = 1 / t.flushed[column];
  let ratio = Math.min(16, Math.max(1 / 16, Math.sqrt((count(column + 1) + 1) / (count(column - 1) + 1))));
  if (Math.abs(ratio - 1) < 1e-6) ratio = 1 + 1e-6;
  const first = 1 / (points * (ratio - 1) / Math.log2(ratio) + (1 - ratio / 2) / 2);
  return count(column) * (Math.min(first * t.firstCell, 1) - 1 / points);
}

// Standard deviation of the change of one step's loss: variances of the prices add up. A parameter was also really
// rounded in each shadow step, unscaled: the mean of these squared changes and of the one of independent errors.
function lossNoise(prices, fmt, k) {
  if (!prices) return NaN;
  let total = 0, known = false;
  for (const price of prices) {
    let variance = 0;
    if (price.alone) {
      const stays = !overflows(price.alone, fmt, k), squared = roundExactly(price.alone, fmt, k).squared;
      if (stays) variance = price.weights.reduce((a, w) => a + w, 0) * squared;
    } else {
      const error = roundingTable(fmt, k, price.source, price.sourceExponent).error, first = price.lo - EXP_LO;
      for (let j = 0; j < price.weights.length; j++) variance += price.weights[j] * error[first + j];
    }
    const real = k === 0 ? price.rounded[fmt.name] : undefined;
    if (real !== undefined) variance = (DATA.shadowSteps * real + variance) / (DATA.shadowSteps + 1);
    if (Number.isNaN(variance)) continue;
    total += variance;
    known = true;
  }
  return known ? Math.sqrt(total) : NaN;
}

// site: {counts, lo, count, amax, amin, sumsq, source, sourceExponent, prices}. Returns what Profile.ask returns.
function ask(site, fmt, k) {
  const t = roundingTable(fmt, k, site.source, site.sourceExponent);
  const counts = site.counts, first = site.lo - EXP_LO;
  let finite = 0, beyond = 0, inTop = 0, flushed = 0, subnormal = 0, flushError = 0;
  let keptEnergy = 0, keptError = 0, topEnergy = 0, topError = 0;
  for (let j = 0; j < counts.length; j++) {
    const i = first + j, n = counts[j], kept = n - n * t.overflows[i], top = n * t.top[i];
    finite += n;
    beyond += n * t.overflows[i];
    inTop += top;
    flushed += n * t.flushed[i];
    subnormal += n * t.subnormal[i];
    flushError += n * t.flushError[i];
    keptEnergy += kept * t.energy[i];
    keptError += kept * t.error[i];
    topEnergy += top * t.energy[i];
    topError += top * t.error[i];
  }

  const ties = moreTies(site, fmt, k, t);
  flushed += ties;
  subnormal -= ties;

  // Overflow: bounds from the bins, settled by the extremes where they can. The end bins hold more than their binade.
  const largest = overflows(site.amax, fmt, k), smallest = overflows(site.amin, fmt, k);
  let atMost = beyond + inTop, surely = beyond;
  if (site.amin < 2 ** EXP_LO && first === 0) surely -= counts[0] * t.overflows[0];
  if (site.amax >= 2 ** (EXP_LO + BINS) && first + counts.length === BINS) atMost = Math.max(atMost, counts[counts.length - 1]);
  const lo = smallest ? finite : largest ? Math.max(surely, 1) : 0;
  const hi = smallest ? finite : largest ? Math.min(atMost, finite - 1) : 0;

  // Signal and noise of what stays in range.
  const top = Math.min(fmt.overflowFrom / 2 ** fmt.emax, 2) - 1;
  const topShare = top * (1 + (1 + top) + (1 + top) ** 2) / 7;
  const cut = hi > 0;
  const energyKept = keptEnergy - (cut ? 1 - topShare : 0) * topEnergy;
  let error = keptError - (cut ? 1 - top : 0) * topError;
  let signal = !cut && Number.isFinite(site.sumsq) && site.sumsq > 0 ? site.sumsq : energyKept;
  const share = energyKept > 0 ? Math.min(Math.max(flushError / energyKept, 0), 1) : 0;
  const told = energyKept > 0 ? signal / energyKept : 1;
  error += Math.min(flushError * (1 + share * (told - 1)), signal) - flushError;
  let noise = lo === finite ? 0 : Math.max(error, 0);

  // All magnitudes equal: nothing is left to estimate.
  if (finite > 0 && site.amax === site.amin) {
    const { lost, squared } = roundExactly(site.amax, fmt, k), stays = hi === 0;
    flushed = lost && stays ? finite : 0;
    subnormal = !lost && stays && binadeOf(site.amax) + k < fmt.emin ? finite : 0;
    signal = stays ? finite * site.amax ** 2 : 0;
    noise = stays ? finite * squared : 0;
  }
  const elements = Math.max(site.count, 1);
  return {
    overflowLo: lo / elements, overflowHi: hi / elements, flushed: flushed / elements, subnormal: subnormal / elements,
    signal, noise, sqnr: noise > 0 ? 10 * Math.log10(signal / noise) : lo > 0 && lo === finite ? NaN : Infinity,
    lossNoise: lossNoise(site.prices, fmt, k),
    room: site.amax > 0 ? Math.log2(fmt.max / site.amax) - k : Infinity,
  };
}

// One word for an answer; WORDS is ordered from harmless to harmful.
const WORDS = ["fits", "tight", "flushes", "may overflow", "overflows", "non-finite"];
const WORD_CLASS = { "fits": "fits", "tight": "tight", "flushes": "flushes", "may overflow": "may", "overflows": "overflows", "non-finite": "broken" };

// own: the scale was chosen from the tensor's largest magnitude, so that it comes close to the end on purpose.
function word(site, answer, own) {
  if (site.nonfinite > 0) return "non-finite";
  if (answer.overflowLo > 0) return "overflows";
  if (answer.overflowHi > 0) return "may overflow";
  if (answer.flushed > DATA.limits.flushed) return "flushes";
  return answer.room < DATA.limits.room && !own ? "tight" : "fits";
}
