"use strict";
// The what-if explorer: one state, one repaint. Every control changes `state` and calls `later`.

const panel = byId("detail");
let rowsShown = [], rowsFound = 0, mapKey = "", listKey = "", listed = { members: [], rows: [] };

// The sites of the chosen role and name, and the rows that stand for them; both change with the filter only.
function listRows() {
  const key = `${state.role}|${state.filter}|${state.alike}`;
  if (key !== listKey) {
    const members = chosenSites();
    listed = { members, rows: state.alike ? groupAlike(members) : members };
    listKey = key;
  }
  return listed;
}

function repaint() {
  const { members, rows } = listRows();
  answerAll(members);
  rows.forEach((row) => row.members && answerGroup(row));
  const found = state.only ? rows.filter((row) => row.word === state.only) : rows;
  const key = state.only ? `${listKey}|${found.map((row) => row.index).join()}` : listKey;
  state.allRoles = state.role === "all";
  if (key !== mapKey) layoutMap(found);
  mapKey = key;
  drawMap(state);
  rowsShown = sorted(found);
  rowsFound = rows.length;
  paintTable();
  paintControls(members, rows);
  paintDetail();
}

let queued = false;

function later() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => {
    queued = false;
    repaint();
    remember();
  });
}

function paintControls(members, rows) {
  byId("scale-out").textContent = state.own ? "its own" : `×${pow2(state.k)}`;
  byId("scale").disabled = state.own;
  byId("scale").setAttribute("aria-valuetext", `two to the power ${state.k}`);
  byId("scale-reset").disabled = state.k === 0 && !state.own;
  byId("scale-plan").hidden = !DATA.choice.scale;
  byId("scale-plan").disabled = state.k === DATA.choice.scale && !state.own;
  const all = members.length === sites.length ? `${sites.length} sites` : `${members.length} of ${sites.length} sites`;
  byId("count").textContent = rows.length === members.length ? all : `${all} in ${rows.length} ${rows.length === 1 ? "row" : "rows"}`;
  byId("explorer-text").textContent = `Each recorded tensor, were it multiplied by ${state.own ? "the largest power of two that its own largest magnitude allows" : pow2(state.k)} and rounded to ${state.format.name} (nearest even; shares in percent of all values; largest value ${number(state.format.max)}, smallest normal ${pow2(state.format.emin)}, smallest subnormal ${pow2(state.format.emin - state.format.p)}).`;
  byId("map-text").textContent = describeMap(state);
  paintWords(rows);
  for (const head of byId("sites").querySelectorAll("thead th")) {
    head.setAttribute("aria-sort", head.dataset.key === state.sort ? (state.down ? "descending" : "ascending") : "none");
  }
}

// How many rows each verdict has; a button shows those alone.
function paintWords(rows) {
  const counts = new Map([...WORDS].reverse().map((w) => [w, 0]));
  for (const row of rows) counts.set(row.word, counts.get(row.word) + 1);
  for (const button of byId("words").children) {
    const w = button.dataset.word, n = counts.get(w);
    button.lastChild.textContent = ` ${n}`;
    button.setAttribute("aria-pressed", String(state.only === w));
    button.disabled = !n && state.only !== w;
  }
}

// Cells are reused: a slider moves figures, it does not rebuild the table.
function paintTable() {
  const pages = Math.max(1, Math.ceil(rowsShown.length / state.shown));
  state.page = Math.min(Math.max(state.page, 0), pages - 1);
  const from = state.page * state.shown, shown = rowsShown.slice(from, from + state.shown);
  const body = byId("sites").tBodies[0], split = document.querySelector(".split");
  if (panel.parentElement !== split) split.append(panel);
  body.querySelector(".detail-row")?.remove();
  body.querySelector(".empty")?.remove();
  while (body.rows.length < shown.length) body.append(newRow());
  while (body.rows.length > shown.length) body.lastElementChild.remove();
  shown.forEach((row, i) => fillRow(body.rows[i], row));
  if (!shown.length) body.append(h("tr", { class: "empty" }, h("td", { colspan: COLUMNS.length }, "No site matches: change the name, the verdict or the tensors chosen.")));
  byId("pages").hidden = rowsShown.length <= Math.min(20, FEW);
  byId("page-text").textContent = shown.length ? `Rows ${from + 1} to ${from + shown.length} of ${rowsShown.length}` : "";
  byId("page-back").disabled = state.page === 0;
  byId("page-on").disabled = state.page >= pages - 1;
  placeDetail(body);
}

function newRow() {
  const head = h("th", { scope: "row" }, h("button", { type: "button", class: "plain" }), h("span", { class: "role" }));
  const cells = COLUMNS.slice(1).map((c) => h("td", { class: c.text ? "num" : null }));
  return h("tr", {}, head, ...cells);
}

function fillRow(row, site) {
  const shown = site.members ? `${site.name} ${site.index}` : String(site.index);
  if (row.dataset.shown !== shown) {
    row.dataset.shown = shown;
    row.dataset.index = site.index;
    const button = row.cells[0].firstChild;
    button.textContent = shorten(site.short, NAME);
    button.title = site.name;
  }
  const role = state.allRoles ? site.role.replace("_", " ") : "";
  if (row.cells[0].lastChild.textContent !== role) row.cells[0].lastChild.textContent = role;
  const chosen = holds(site, state.selected);
  row.classList.toggle("chosen", chosen);
  row.cells[0].firstChild.setAttribute("aria-expanded", chosen);
  COLUMNS.slice(1).forEach((column, i) => {
    const cell = row.cells[i + 1];
    if (!column.text) {
      const word = site.members ? `${site.word} ${site.same}/${site.members.length}` : site.word;
      if (cell.textContent !== word) cell.replaceChildren(column.cell(site));
      return;
    }
    const text = column.text(site);
    if (cell.textContent === text) return;
    if (text === "0") cell.replaceChildren(h("span", { class: "zero" }, "0"));
    else cell.textContent = text;
  });
}

// On narrow screens the details open below their row, on wide ones they stand beside the table.
function placeDetail(body) {
  const narrow = NARROW.matches && !map.printing;
  panel.hidden = false;
  if (!narrow) return;
  const row = [...body.rows].find((r) => r.classList.contains("chosen"));
  panel.hidden = !row;
  if (!row) return;
  body.closest(".scroll").style.setProperty("--detail-width", `${body.closest(".scroll").clientWidth}px`);
  row.after(h("tr", { class: "detail-row" }, h("td", { colspan: COLUMNS.length }, panel)));
}

function choose(index, from) {
  const role = sites[index].role;
  state.selected = index === state.selected && from === "table" && NARROW.matches ? -1 : index;
  if (state.role !== "all" && role !== state.role) {
    state.role = role;
    byId("role").value = role;
  }
  if (from === "map") {
    const place = rowsShown.findIndex((row) => holds(row, index));
    if (place >= 0) state.page = Math.floor(place / state.shown);
  }
  later();
}

function answersOf(t) {
  const share = (n) => n / Math.max(t.count, 1), a = t.answer;
  return [DATA.modules[t.module], t.role, t.call, state.format.name, scaleOf(t), t.count, t.amax, t.amin, share(t.zeros), share(t.nonfinite), a.overflowLo, a.overflowHi, a.flushed, a.subnormal, a.sqnr, a.lossNoise];
}

const ANSWER_COLUMNS = ["module", "role", "call", "format", "scale_exponent", "count", "amax", "amin_nonzero", "zeros", "nonfinite", "overflow_lo", "overflow_hi", "flushed", "subnormal", "sqnr_db", "loss_noise"];

// The rows of the table on all its pages; of a row that stands for several sites, each of them.
function shownCsv() {
  const shown = rowsShown.flatMap((row) => row.members || [row]);
  saveCsv(`precscope-${state.format.name}-${state.role}`, ANSWER_COLUMNS, shown.map(answersOf));
}
