// Puts the page together, and keeps it up to date.

const Source = { http: HttpSource, app: AppSource, file: FileSource }[document.documentElement.dataset.source];
const page = {};

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  page.charts?.recolor();
  page.stream?.draw();
}

/** Says what is wrong; a problem of the connection goes with the next frame, others stay until they are read. */
function problem(text, ...more) {
  const place = byId("problem");
  place.hidden = !text;
  const close = more.length ? [] : [make("button", { text: "✕", "aria-label": "Close", click: () => problem("") })];
  place.replaceChildren(...(text ? [make("span", { text: `${text} ` }), ...more, ...close] : []));
}

function status(words, kind) {
  const place = byId("status");
  place.className = kind;
  if (place.textContent !== words) place.textContent = words;
}

// --- parts of the page

function showCounts(head) {
  const counts = Object.entries(head.counts);
  const total = counts.reduce((sum, [, count]) => sum + count, 0);
  fill(byId("bar"), JSON.stringify(counts), () => [...counts].reverse().map(([state, count]) => make("i", { style: { width: `${(100 * count) / total}%`, background: stateColor(state) } })));
  fill(byId("chips"), JSON.stringify([counts, page.states]), () => counts.map(([state, count]) =>
    make("button", { class: "chip", "aria-pressed": String(page.states.includes(state)), text: `${count.toLocaleString("en")} ${state}`, style: { "--key": stateColor(state) }, click: () => toggleState(state) })));
  const s = head.statistics;
  const facts = [];
  if (s) {
    facts.push(`${seconds(s.makespan)} from the first submission to the last end`);
    if (s.throughput) facts.push(`${plain(s.throughput)} tasks a second`);
    if (s.tokens) facts.push(`${plain(s.tokens.out_per_s)} tokens a second out`);
    for (const busy of s.busy) facts.push(`${busy.backend}: ${Math.round(100 * busy.share)} % of ${busy.places} ${busy.of}`);
    if (s.path.steps.length) facts.push(`critical path: ${s.path.steps.slice(-6).map((step) => step.task).join(" → ")}`);
  }
  byId("facts").textContent = facts.join("; ");
}

function showFailures(head) {
  byId("failures").hidden = !head.failures.length;
  fill(byId("failure-groups"), JSON.stringify([head.failures, head.failures_left_out]), () => {
    const opened = new Set([...byId("failure-groups").querySelectorAll("details[open]")].map((one) => one.dataset.name));
    const more = head.failures_left_out ? [make("p", { class: "note", text: `${head.failures_left_out} more kinds of failure are not shown here; the table of tasks has them.` })] : [];
    return [...head.failures.map((group) => {
      const name = `${group.state} ${group.cause} ${group.error}`;
      const many = group.count === 1 ? "" : `${group.count} × `;
      const box = make("details", { class: group.state, "data-name": name, open: opened.has(name) });
      const words = make("span", { text: ` ${group.error.split("\n")[0].slice(0, 300)}` });
      box.append(make("summary", {}, make("b", { text: `${many}${group.cause}` }), words));
      if (group.place) box.append(make("p", { class: "note", text: group.place }));
      if (group.traceback) box.append(make("pre", { text: group.traceback }));
      else if (group.error.includes("\n") || group.error.length > 300) box.append(make("pre", { text: group.error }));
      box.append(make("div", { class: "list" }, ...group.tasks.map((task) => make("button", { class: "link", text: task.name, click: () => page.detail.open(page.session, { uid: task.uid }) }))));
      if (group.count > group.tasks.length) box.append(make("p", { class: "note", text: `and ${group.count - group.tasks.length} more; the table of tasks has them` }));
      return box;
    }), ...more];
  });
}

function showLegend() {
  const { spans, stream } = page;
  const more = spans.groups.length - LEGEND;
  fill(byId("legend"), JSON.stringify([spans.groups, stream.only]), () => [...spans.groups.slice(0, LEGEND).map((name, group) =>
    make("button", { class: "key", text: name, title: name, "aria-pressed": String(stream.only === group), style: { "--key": spans.colors[group] }, click: () => {
      stream.only = stream.only === group ? null : group;
      stream.draw();
      showLegend();
    } })), ...(more > 0 ? [make("span", { class: "note", text: `and ${more} more` })] : [])]);
}

function showGraphOf(head) {
  const { graph } = head;
  byId("graph-section").hidden = graph.nodes.length < 2 || !graph.edges.length;
  const key = JSON.stringify(graph);
  if (byId("graph-section").hidden || page.graphKey === key) return;
  page.graphKey = key;
  showGraph(byId("graph"), byId("graph-note"), graph, (node) => page.detail.open(page.session, { uid: node.id }), (node) => {
    byId("filter").value = node.name;
    refreshTable(0);
    byId("tasks").scrollIntoView();
  });
}

function row(cells, numbers = 1) {
  return make("tr", {}, ...cells.map((cell, at) => make("td", at >= numbers ? { class: "number", text: cell } : { text: cell })));
}

function showTimes(head) {
  const s = head.statistics;
  byId("times-section").hidden = !s;
  if (!s) return;
  const columns = ["", "tasks", "queue p50", "p95", "p99", "execution p50", "p95", "p99", "a second"];
  const cells = (name, one) => [name, Object.values(one.counts ?? head.counts).reduce((sum, count) => sum + count, 0).toLocaleString("en"), ...["queue", "execution"].flatMap((part) => ["p50", "p95", "p99"].map((key) => (one.ran === 0 ? "–" : seconds(one.times[part][key])))), plain(one.throughput)];
  fill(byId("times"), JSON.stringify([s.times, s.groups, s.groups_left_out]), () => {
    const groups = Object.entries(s.groups);
    const rows = [...(groups.length > 1 ? [row(cells("all", s))] : []), ...groups.map(([name, group]) => row(cells(name, group)))];
    if (s.groups_left_out) rows.push(row([`and ${s.groups_left_out} quicker groups`, ...columns.slice(1).map(() => "")]));
    return [make("thead", {}, make("tr", {}, ...columns.map((text, at) => make("th", { text, scope: "col", class: at ? "number" : null })))), make("tbody", {}, ...rows)];
  });
}

function showResources(head) {
  byId("resources-section").hidden = !head.backends.length;
  const lines = head.backends.map((one) => {
    const has = [one.cores && `${one.cores} cores`, one.workers && `${one.workers} workers`, one.gpus && `${one.gpus} GPUs`, one.memory_gb && `${one.memory_gb} GB`, one.model, one.device, one.host].filter(Boolean).join(", ");
    return `${one.name} runs ${one.runs.join(", ")} tasks${has ? ` on ${has}` : ""}${one.engine ? `: ${one.engine}` : ""}`;
  });
  const nodes = Object.entries(head.statistics?.nodes ?? {});
  if (nodes.length) lines.push(`Tasks by node: ${nodes.slice(0, 32).map(([node, count]) => `${node} ${count}`).join(", ")}`);
  if (head.allocation) lines.push(`Allocation: ${head.allocation}`);
  fill(byId("resources"), JSON.stringify(lines), () => lines.map((text) => make("div", { text })));
  fill(byId("notices"), JSON.stringify(head.notices), () => head.notices.map((notice) => make("li", { text: `${clock(notice.at)} ${notice.text}` })));
}

// --- the table of tasks

function toggleState(state) {
  page.states = page.states.includes(state) ? page.states.filter((one) => one !== state) : [...page.states, state];
  showCounts(page.head);
  refreshTable(0);
}

async function refreshTable(offset = page.offset ?? 0) {
  const asked = { session: page.session, states: page.states.join(","), name: byId("filter").value, offset: String(offset), limit: String(ROWS_A_PAGE) };
  page.offset = offset;
  const key = JSON.stringify(asked);
  if (page.tableAsked === key) return;
  page.tableAsked = key;
  try {
    const answer = await source.ask("tasks", asked);
    if (page.tableAsked === key) showTable(answer, offset);
  } catch (error) {
    byId("task-note").textContent = error.message;
  } finally {
    if (page.tableAsked === key) page.tableAsked = null;
  }
}

function showTable({ total, tasks }, offset) {
  const columns = ["name", "state", "kind", "queue", "execution", "error"];
  fill(byId("task-table"), JSON.stringify(tasks), () => [
    make("caption", { class: "note", hidden: true, text: "Tasks" }),
    make("thead", {}, make("tr", {}, ...columns.map((text, at) => make("th", { text, scope: "col", class: at === 3 || at === 4 ? "number" : null })))),
    make("tbody", {}, ...tasks.map((task) => make("tr", {},
      make("td", {}, make("button", { class: "link", text: task.name, click: () => page.detail.open(page.session, { uid: task.uid }) })),
      make("td", { class: "state" }, make("span", { class: "key", text: task.replaced ? `${task.state}, replaced` : task.state, style: { "--key": stateColor(task.state) } })),
      make("td", { text: task.kind }), make("td", { class: "number", text: seconds(task.queue_s) }),
      make("td", { class: "number", text: task.started ? `since ${clock(task.started)}` : seconds(task.execution_s) }), make("td", { class: "error", text: task.error, title: task.error })))),
  ]);
  const more = make("span");
  if (offset > 0) more.append(make("button", { text: "◀ before", click: () => refreshTable(Math.max(0, offset - ROWS_A_PAGE)) }), " ");
  if (offset + tasks.length < total) more.append(make("button", { text: "next ▶", click: () => refreshTable(offset + ROWS_A_PAGE) }));
  byId("task-note").replaceChildren(make("span", { text: total ? `${offset + 1} to ${offset + tasks.length} of ${total.toLocaleString("en")} ` : page.states.length || byId("filter").value ? "No task is like this. " : "No task yet. " }), more);
}

// --- frames

function apply(frame) {
  const { spans, stream } = page;
  spans.apply(frame.block);
  const head = (page.head = frame.head);
  stream.show(head);
  showLegend();
  showCounts(head);
  showFailures(head);
  showGraphOf(head);
  showTimes(head);
  showResources(head);
  refreshTableSoon();
  loadHistory();
}

/** Refreshes the table at most every 2 s, and not while nobody looks: the server reads all tasks for it. */
function refreshTableSoon() {
  const wait = (page.tableAt ?? 0) + 2000 - performance.now();
  if (document.hidden || page.tableTimer) return;
  page.tableTimer = setTimeout(() => {
    page.tableTimer = null;
    page.tableAt = performance.now();
    refreshTable();
  }, Math.max(0, wait));
}

/** Loads the rows before those that are here, one block after the other. */
async function loadHistory() {
  const { spans, session } = page;
  if (!spans.first || page.loading || !source.ask) return;
  page.loading = true;
  try {
    const first = Math.max(0, spans.first - 100000);
    const block = await source.ask("rows", { session, first: String(first), last: String(spans.first) });
    if (page.session === session && page.spans === spans && first + block.rows === spans.first) {
      spans.prepend(block);
      page.stream.draw();
    }
  } finally {
    page.loading = false;
  }
  loadHistory();
}

async function watch(session) {
  page.ending?.abort();
  const ending = (page.ending = new AbortController());
  Object.assign(page, { session, states: [], offset: 0, graphKey: null, head: null, tableAt: 0 });
  document.title = `${session} - Rhapsody`;
  if (Source === HttpSource) history.replaceState(null, "", `#session=${encodeURIComponent(session)}`);
  byId("filter").value = "";
  page.stream.only = null;
  page.stream.head = null;
  page.spans.clear(0);
  page.charts.clear();
  page.stream.fit();
  for (let wait = 1; !ending.signal.aborted; wait = Math.min(wait * 2, 30)) {
    try {
      for await (const frame of source.frames(session, ending.signal)) {
        if (ending.signal.aborted) return;
        if (page.isCutOff) problem("");
        page.isCutOff = false;
        wait = 1;
        apply(frame);
        status(Source === FileSource ? `as of ${new Date(frame.head.now * 1000).toLocaleString()}` : frame.head.closed ? "closed" : "live", frame.head.closed || Source === FileSource ? "" : "live");
      }
      if (Source === FileSource || page.head?.closed) return;
    } catch (error) {
      if (ending.signal.aborted) return;
      if (refused(error, () => watch(session))) return;
      if (error.status === 404 || /^unknown_session|unknown session/.test(error.message)) return gone(session, error.message);
      page.isCutOff = true;
      problem(error.message);
    }
    status("the connection is lost; trying again", "lost");
    await new Promise((resolve) => setTimeout(resolve, wait * 1000));
  }
}

/** The session is not open any more, or never was. */
function gone(session, message) {
  status(page.head ? "closed" : "not open", "");
  if (!page.head) problem(message);
}

/** Asks for a token where the server wants one. */
function refused(error, again) {
  if (error.status !== 401) return false;
  status("no access", "lost");
  const input = make("input", { type: "password", "aria-label": "Token", autocomplete: "off" });
  const form = make("form", { submit: (event) => {
    event.preventDefault();
    source.store(input.value.trim());
    problem("");
    again();
  } }, input, make("button", { text: "Open" }));
  problem(`${error.message} `, form);
  return true;
}

async function chooseSession() {
  const select = byId("session");
  let rows;
  try {
    rows = (await source.ask("sessions")).sessions;
  } catch (error) {
    if (!refused(error, chooseSession)) problem(error.message);
    return;
  }
  const names = rows.map((one) => one.session);
  const wanted = page.session ?? source.session ?? names.at(-1);
  const closed = wanted && !names.includes(wanted) ? [make("option", { value: wanted, text: `${wanted} (not open)` })] : [];
  fill(select, JSON.stringify([names, wanted]), () => [...closed, ...names.map((name) => make("option", { value: name, text: name }))]);
  if (!wanted) {
    status("no session is open", "");
    return setTimeout(chooseSession, 3000);
  }
  select.value = wanted;
  if (!page.session) watch(wanted);
}

function button(text, click, more = {}) {
  return make("button", { text, click, ...more });
}

const LEGEND = 24;

function toolbar() {
  const { stream } = page;
  byId("stream-tools").append(
    button("+", () => stream.zoom(0.6), { title: "Zoom in" }), button("−", () => stream.zoom(1.6), { title: "Zoom out" }),
    button("◀", () => stream.move(-0.25), { title: "Earlier" }), button("▶", () => stream.move(0.25), { title: "Later" }),
    button("All", () => stream.fit(), { title: "Show all" }), button("Now", () => stream.followNow(), { title: "Follow what happens now" }));
  if (Source !== AppSource) byId("stream-tools").append(button("Save as PNG", async () => save(`${page.session}.png`, "image/png", await stream.png())));
  if (Source !== HttpSource) return;
  byId("saving").append(
    ...[["Report", "report", "html"], ["Trace", "trace", "trace.json"], ["SVG", "picture", "svg"]].map(([text, what, ending]) =>
      button(text, () => source.download(what, page.session, `${page.session}.${ending}`).catch((error) => problem(error.message)), { title: `Save as .${ending}` })), " ");
}

let source;

async function begin() {
  source = new Source();
  page.states = [];
  page.spans = new Spans();
  page.detail = new Detail(source);
  page.stream = new Stream(byId("stream"), byId("tip"), page.spans, (query) => page.detail.open(page.session, query));
  page.stream.isStill = Source === FileSource;
  page.charts = new Charts(byId("charts"), page.spans);
  page.stream.onView = () => page.charts.show(page.head, page.stream.view());
  toolbar();
  byId("theme").addEventListener("click", () => {
    const isDark = (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    setTheme(isDark ? "light" : "dark");
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (page.charts.recolor(), page.stream.draw()));
  byId("filter").addEventListener("input", () => refreshTable(0));
  byId("session").addEventListener("change", (event) => watch(event.target.value));
  if (Source === AppSource) {
    await source.begin();
    await source.sessionKnown;
  }
  await chooseSession();
  if (Source !== FileSource) {
    byId("session").addEventListener("focus", chooseSession);
    setInterval(() => page.detail.query && page.detail.isOpen && (page.detail.tick(), page.detail.refresh()), 1000);
    addEventListener("hashchange", () => {
      const session = new URLSearchParams(location.hash.slice(1)).get("session");
      if (session && session !== page.session) watch(session).catch(() => {}), chooseSession();
    });
    const live = () => (page.head?.running.length && !document.hidden && page.stream.follow && page.stream.draw(), setTimeout(live, 250));
    live();
  }
}

begin();
