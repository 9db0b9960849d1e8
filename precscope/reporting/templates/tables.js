"use strict";
// Everything the page shows as tables: to look at, as CSV, as Parquet where the page carries it.

const PAGE_ROWS = 50;
const view = { name: "", page: 0, table: null };

// CSV that no spreadsheet takes for a formula; unknown values are empty.
function saveCsv(name, columns, rows) {
  const cell = (v) => (v === null || v === undefined || Number.isNaN(v) ? "" : v === Infinity ? "inf" : v === -Infinity ? "-inf" : String(v));
  const quote = (v) => {
    const text = cell(v), formula = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) && text !== "-inf";
    return `"${formula ? "'" : ""}${text.replaceAll('"', '""')}"`;
  };
  download(`${name}.csv`, [columns, ...rows].map((row) => row.map(quote).join(",")).join("\r\n") + "\r\n", "text/csv");
}

function saveParquet(table) {
  const text = atob(table.parquet), bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
  download(`precscope-${table.name}.parquet`, bytes, "application/vnd.apache.parquet");
}

// {columns, rows} of a table; those of sites are made from what the page works on.
function contentOf(table) {
  if (table.columns) return table;
  const key = (t) => [DATA.modules[t.module], t.role, t.call];
  if (table.name === "history") {
    const rows = sites.flatMap((t) => t.logs.map((v, i) => [...key(t), DATA.steps[i], v === null ? null : Number((2 ** v).toPrecision(3)), t.broken.includes(i)]));
    return { columns: ["module", "role", "call", "step", "amax", "nonfinite"], rows: rows.filter((row) => row[4] !== null || row[5]) };
  }
  answerAll(sites);
  return {
    columns: [...ANSWER_COLUMNS, "sumsq", "source", "source_exponent", "histogram_from", "histogram"],
    rows: sites.map((t) => [...answersOf(t), t.sumsq, t.sourceName, t.sourceExponent, t.lo, t.counts.join(" ")]),
  };
}

function buildTables() {
  const size = (n) => (n >= 1e6 ? `${(n / 1e6).toPrecision(3)} MB` : `${Math.max(1, Math.round(n / 1e3))} kB`);
  byId("tables").append(...DATA.tables.map((table) => {
    const button = (text, onclick) => h("button", { type: "button", onclick }, text, h("span", { class: "hidden-label" }, ` of ${table.name}`));
    const show = button("View", () => viewTable(table));
    show.dataset.table = table.name;
    return h("tr", {}, h("th", { scope: "row", class: "mono" }, table.name), h("td", {}, table.says), h("td", { class: "num" }, table.count.toLocaleString("en-US")),
      h("td", { class: "actions" }, show, button("CSV", () => { const c = contentOf(table); saveCsv(`precscope-${table.name}`, c.columns, c.rows); }),
        table.parquet ? button(`Parquet, ${size(table.size)}`, () => saveParquet(table)) : h("span", { class: "small soft" }, `Parquet (${size(table.size)}) left out`)));
  }));
  byId("table-back").addEventListener("click", () => { view.page -= 1; paintView(); });
  byId("table-on").addEventListener("click", () => { view.page += 1; paintView(); });
  byId("table-close").addEventListener("click", () => { view.name = ""; paintView(); document.querySelector(`[data-table="${view.last}"]`)?.focus(); });
}

function viewTable(table) {
  Object.assign(view, { name: table.name, last: table.name, page: 0, table: contentOf(table) });
  paintView();
  byId("viewer-title").focus();
}

function paintView() {
  byId("viewer").hidden = !view.name;
  if (!view.name) return void (view.table = null);
  const { columns, rows } = view.table, from = view.page * PAGE_ROWS, shown = rows.slice(from, from + PAGE_ROWS);
  const numeric = columns.map((_, i) => shown.some((row) => typeof row[i] === "number"));
  byId("viewer-title").textContent = `Table: ${view.name}`;
  byId("viewer-table").replaceChildren(
    h("caption", { class: "hidden-label" }, `Table ${view.name}, rows ${from + 1} to ${from + shown.length} of ${rows.length}`),
    h("thead", {}, h("tr", {}, columns.map((c, i) => h("th", { scope: "col", class: numeric[i] ? "num" : null }, c)))),
    h("tbody", {}, shown.map((row) => h("tr", {}, row.map((v, i) => h("td", { class: numeric[i] ? "num" : null }, cellText(v)))))),
  );
  byId("table-text").textContent = `Rows ${from + 1} to ${from + shown.length} of ${rows.length.toLocaleString("en-US")}`;
  byId("table-back").disabled = view.page === 0;
  byId("table-on").disabled = from + PAGE_ROWS >= rows.length;
}

function cellText(v) {
  if (v === null || v === undefined) return MISSING;
  if (typeof v === "number") return Number.isInteger(v) && Math.abs(v) < 1e15 ? String(v) : number(v);
  return typeof v === "boolean" ? (v ? "yes" : "no") : shorten(String(v), 160);
}
