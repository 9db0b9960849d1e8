"use strict";
// Numbers as people read them; the same rules as reporting/numbers.py.

const MISSING = "–";

const stripZeros = (text) => (text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text);

function number(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return MISSING;
  if (!Number.isFinite(x)) return x > 0 ? "inf" : "-inf";
  const sign = x < 0 ? "-" : "", a = Math.abs(x);
  if (a === 0) return "0";
  if (a >= 1e4 && a < 1e5 && Math.round(a) < 1e5) return sign + Math.round(a);
  if (a >= 1e-3 && a < 1e4) {
    const text = a.toPrecision(4);
    return sign + (text.includes("e") ? String(Number(text)) : stripZeros(text));
  }
  const [mantissa, exponent] = a.toExponential(3).split("e");
  return `${sign}${stripZeros(mantissa)}e${Number(exponent)}`;
}

function percent(share) {
  if (share > 0 && share < 1e-6) return "<0.0001";
  return number(share === null || share === undefined ? null : 100 * share);
}

function fixed(x, digits = 1) {
  if (x === null || x === undefined || Number.isNaN(x)) return MISSING;
  if (!Number.isFinite(x)) return x > 0 ? "exact" : "-inf";
  const text = Math.abs(x).toFixed(digits);
  return (x < 0 && Number(text) !== 0 ? "-" : "") + text;
}

function interval(lo, hi) {
  const low = percent(lo), high = percent(hi);
  return low === high ? low : `${low}..${high}`;
}

// Powers of two as they are written: 2^-14 becomes 2 with a raised -14.
const RAISED = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const pow2 = (k) => "2" + [...String(k)].map((c) => RAISED[c] || c).join("");

function shorten(text, width) {
  if (text.length <= width) return text;
  if (width <= 1) return "…".slice(0, width);
  const head = Math.floor((width - 1) / 2);
  return text.slice(0, head) + "…" + text.slice(text.length - (width - 1 - head));
}
