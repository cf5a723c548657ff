// Where the data comes from: the server over HTTP, the host of an MCP App, or the file itself.

/** The server says something at least every 15 s; after this time the connection is taken for lost. */
const SILENCE_MS = 40000;

/** Over HTTP. The token stands in the fragment of the address, which no server gets, and then in this tab's storage. */
class HttpSource {
  constructor() {
    const base = new URL(location.href);
    base.hash = base.search = "";
    this.base = base;
    const given = new URLSearchParams(location.hash.slice(1));
    this.session = given.get("session") ?? new URLSearchParams(location.search).get("session");
    if (given.get("token")) {
      this.store(given.get("token"));
      given.delete("token");
      history.replaceState(null, "", `${location.pathname}${location.search}${given.size ? `#${given}` : ""}`);
    }
  }

  get token() {
    if (this.own !== undefined) return this.own;
    try {
      return sessionStorage.getItem("rhapsody-token") ?? "";
    } catch {
      return "";
    }
  }

  store(token) {
    this.own = /^[\x21-\x7e]*$/.test(token) ? token : "not-a-token"; // a header takes no other characters
    try {
      sessionStorage.setItem("rhapsody-token", this.own);
    } catch {} // a browser may refuse storage; the token then lives as long as the page
  }

  async fetch(what, query, options = {}) {
    const url = new URL(what, this.base);
    for (const [name, value] of Object.entries(query)) if (value !== undefined && value !== null) url.searchParams.set(name, value);
    const headers = this.token ? { Authorization: `Bearer ${this.token}` } : {};
    let response;
    try {
      response = await fetch(url, { ...options, headers, cache: "no-store", credentials: "same-origin" });
    } catch (error) {
      throw options.signal?.aborted ? error : new Error("The server cannot be reached.");
    }
    if (response.ok) return response;
    const text = await response.text();
    let message = text;
    try {
      const body = JSON.parse(text);
      message = body.error?.message ?? body.error ?? text;
    } catch {} // a proxy's own page
    throw Object.assign(new Error(String(message).slice(0, 500)), { status: response.status });
  }

  async ask(what, query = {}) {
    const answer = await (await this.fetch(what, query)).json();
    if (what === "sessions") this.mayCancel = answer.may_cancel;
    return answer;
  }

  async act(what, query) {
    return (await this.fetch(what, query, { method: "POST" })).json();
  }

  /** The frames of a session, until `signal` ends them. */
  async *frames(session, signal) {
    const silence = new AbortController();
    let timer;
    const heard = () => {
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENCE_MS);
    };
    signal.addEventListener("abort", () => silence.abort());
    try {
      yield* this.events(session, silence.signal, heard);
    } finally {
      clearTimeout(timer);
      silence.abort(); // a page that has left the loop reads no more
    }
  }

  async *events(session, signal, heard) {
    heard();
    const response = await this.fetch("events", { session }, { signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      heard();
      text += value;
      let end;
      while ((end = text.indexOf("\n\n")) >= 0) {
        const event = text.slice(0, end);
        text = text.slice(end + 2);
        if (event.startsWith("data: ")) yield JSON.parse(event.slice(6));
      }
    }
  }

  async download(what, session, name) {
    const response = await this.fetch(what, { session });
    save(name, response.headers.get("Content-Type"), await response.blob());
  }
}

/** In the frame of an MCP host, which passes messages on (MCP Apps, specification 2026-01-26). */
class AppSource {
  constructor() {
    this.waiting = new Map();
    this.mayCancel = true;
    this.number = 0;
    this.session = null;
    this.sessionKnown = new Promise((resolve) => (this.learn = resolve));
    window.addEventListener("message", (event) => event.source === window.parent && this.receive(event.data));
  }

  async begin() {
    const answer = await this.request("ui/initialize", {
      protocolVersion: "2026-01-26",
      appInfo: { name: "rhapsody-dashboard", version: "1" },
      appCapabilities: { availableDisplayModes: ["inline", "fullscreen"] },
    });
    this.heed(answer.hostContext ?? {});
    if (answer.hostContext?.availableDisplayModes?.includes("fullscreen"))
      byId("saving").append(make("button", { text: "Enlarge", click: () => this.request("ui/request-display-mode", { mode: "fullscreen" }) }));
    this.notify("ui/notifications/initialized");
    const root = document.documentElement;
    new ResizeObserver(() => this.notify("ui/notifications/size-changed", { width: root.scrollWidth, height: Math.ceil(document.body.getBoundingClientRect().height) })).observe(document.body);
  }

  heed(context) {
    if (context.theme) setTheme(context.theme);
    const fonts = context.styles?.variables?.["--font-sans"];
    if (fonts) document.body.style.fontFamily = fonts;
  }

  post(message) {
    window.parent.postMessage({ jsonrpc: "2.0", ...message }, "*");
  }

  notify(method, params = {}) {
    this.post({ method, params });
  }

  request(method, params) {
    const id = ++this.number;
    this.post({ id, method, params });
    return new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject }));
  }

  receive(message) {
    if (!message || message.jsonrpc !== "2.0") return;
    const open = this.waiting.get(message.id);
    if (open && !message.method) {
      this.waiting.delete(message.id);
      return message.error ? open.reject(new Error(message.error.message)) : open.resolve(message.result);
    }
    const session = message.params?.arguments?.session;
    if (message.method === "ui/notifications/tool-input" && session) this.learn((this.session = session));
    if (message.method === "ui/notifications/tool-result" && message.params?.structuredContent?.session) this.learn((this.session = message.params.structuredContent.session));
    if (message.method === "ui/notifications/host-context-changed") this.heed(message.params ?? {});
    if (message.method === "ui/resource-teardown") {
      this.ended = true;
      this.post({ id: message.id, result: {} });
    } else if (message.id !== undefined && message.method) {
      this.post(message.method === "ping" ? { id: message.id, result: {} } : { id: message.id, error: { code: -32601, message: "this page has no such method" } });
    }
  }

  async call(name, parameters) {
    const result = await this.request("tools/call", { name, arguments: parameters });
    if (result.isError) throw new Error(result.content?.[0]?.text ?? "the call failed");
    return result.structuredContent;
  }

  async ask(what, query = {}) {
    return this.call("dashboard", { what, query });
  }

  async act(what, { session, tasks }) {
    return this.call("cancel_tasks", { session, force: true, ...(tasks ? { tasks: tasks.split(",") } : { all_open: true }) });
  }

  async *frames(session, signal) {
    let [cursor, version] = ["", -1];
    while (!signal.aborted && !this.ended) {
      const frame = await this.ask("frame", { session, cursor, version: String(version) });
      ({ cursor, version } = frame);
      if (frame.head.closed) this.ended = true;
      if (!document.hidden || version === 0) yield frame;
      else await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true })), (cursor = ""), (version = -1);
    }
  }
}

/** In a saved report, which holds all data. */
class FileSource {
  constructor() {
    this.data = JSON.parse(byId("data").textContent);
    const { fields, rows } = this.data.tasks;
    this.data.tasks = rows.map((row) => Object.fromEntries(fields.map((field, at) => [field, row[at]])));
    this.session = this.data.head.session;
  }

  async *frames() {
    yield this.data;
  }

  async ask(what, query) {
    if (what === "sessions") return { sessions: [{ session: this.session, counts: this.data.head.counts }] };
    if (what === "task") {
      const uid = query.row !== undefined ? this.data.tasks[this.data.rows[query.row]].uid : query.uid;
      return this.data.details[uid] ?? { ...this.data.tasks.find((task) => task.uid === uid), note: "The report has no more than this of the task." };
    }
    const states = query.states ? query.states.split(",") : [];
    const name = (query.name ?? "").toLowerCase();
    const found = this.data.tasks.filter((task) => (!states.length || (states.includes(task.state) && !task.replaced)) && (task.name.toLowerCase().includes(name) || task.uid.includes(name)));
    return { total: found.length, tasks: found.slice(+query.offset || 0, (+query.offset || 0) + ROWS_A_PAGE) };
  }
}
