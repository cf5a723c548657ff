// One task in full: its error and traceback first, then its times, result and output.

class Detail {
  constructor(source) {
    this.source = source;
    this.dialog = byId("detail");
    byId("detail-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => (this.query = this.canceled = null));
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
  }

  async open(session, query) {
    this.query = { session, ...query };
    const asked = this.query;
    byId("detail-title").textContent = "…";
    byId("detail-body").replaceChildren();
    if (!this.dialog.open) this.dialog.showModal();
    await this.refresh(asked);
  }

  async refresh(asked = this.query) {
    if (!asked || asked !== this.query || this.asking) return;
    this.asking = true;
    try {
      const task = await this.source.ask("task", asked);
      if (asked === this.query) this.show(task);
    } catch (error) {
      if (asked === this.query) byId("detail-body").replaceChildren(make("p", { text: error.message }));
    } finally {
      this.asking = false;
    }
  }

  show(task) {
    byId("detail-title").textContent = task.name;
    const body = byId("detail-body");
    const place = body.parentElement.scrollTop;
    const live = () => [...body.querySelectorAll("pre.live")];
    const before = live().map((one) => (one.scrollTop + one.clientHeight >= one.scrollHeight - 4 ? null : one.scrollTop));
    fill(body, JSON.stringify(task), () => [...this.parts(task)]);
    body.parentElement.scrollTop = place;
    live().forEach((output, at) => (output.scrollTop = before[at] ?? output.scrollHeight)); // at its end, or where it was
    this.isOpen = !this.hasEnded(task);
    this.since = this.isOpen && task.started;
    this.tick();
  }

  hasEnded(task) {
    return STATES.includes(task.state);
  }

  /** Shows for how long the task runs, by the clock of the server. */
  tick() {
    const place = byId("running-for");
    if (place && this.since) place.textContent = seconds(page.stream.now() - this.since);
  }

  *parts(task) {
    const open = (uid) => this.open(this.query.session, { uid });
    const links = (tasks) => make("div", { class: "list" }, ...tasks.map((one) => make("button", { class: "link", text: one.name, click: () => open(one.uid) })));
    const block = (title, text, attributes = {}) => (text ? [make("h3", { text: title }), make("pre", { text, ...attributes })] : []);
    yield make("span", { class: "chip", text: [task.state, task.cause].filter(Boolean).join(", cause "), style: { "--key": stateColor(task.state) } });
    if (task.note) yield make("p", { text: task.note });
    yield* block("Error", task.error);
    yield* block("Traceback", task.traceback);
    const progress = task.progress;
    const facts = {
      id: task.uid,
      kind: task.kind,
      runs: task.what,
      backend: task.backend,
      nodes: task.nodes?.join(", "),
      worker: task.worker,
      needs: task.needs && Object.entries(task.needs).map(([name, value]) => `${name} ${value}`).join(", "),
      submitted: task.submitted && moment(task.submitted),
      "in the queue": this.hasEnded(task) ? seconds(task.queue_s) : undefined,
      "running for": task.started && !this.hasEnded(task) ? " " : undefined,
      execution: this.hasEnded(task) ? seconds(task.execution_s) : undefined,
      ended: task.ended && moment(task.ended),
      attempts: task.attempts > 1 ? task.attempts : undefined,
      "exit code": task.exit_code ?? undefined,
      progress: progress && [progress.step !== undefined && `${progress.step}${progress.of ? ` of ${progress.of}` : ""}`, progress.message, ...Object.entries(progress.numbers ?? {}).map(([name, value]) => `${name} ${plain(value)}`)].filter(Boolean).join(", "),
      tokens: task.usage && `${task.usage.prompt_tokens} in, ${task.usage.completion_tokens} out`,
      used: task.measured && [`${plain(task.measured.cpu_s)} CPU seconds`, task.measured.peak_memory_bytes && `${plain(task.measured.peak_memory_bytes / 1e9)} GB at most`].filter(Boolean).join(", "),
      waits: task.held_until && `until ${task.held_until}`,
      "last failure": task.last_failure,
    };
    const list = make("dl");
    for (const [name, value] of Object.entries(facts)) if (value !== undefined && value !== "" && value !== null && value !== false) list.append(make("dt", { text: name }), make("dd", { text: value, id: name === "running for" ? "running-for" : null }));
    yield make("h3", { text: "Facts" });
    yield list;
    for (const note of task.notes ?? []) yield make("p", { class: "note", text: note });
    if (task.sources?.length) yield make("h3", { text: "Needs" }), yield links(task.sources);
    if (task.children?.length) yield make("h3", { text: "Its tasks" }), yield links(task.children);
    yield* block("Result", task.result);
    const size = (printed) => (printed.size > byteCount(printed.text) ? `, the last of ${printed.size} bytes` : "");
    const live = this.hasEnded(task) ? {} : { class: "live" };
    if (task.stdout) yield* block(`stdout${size(task.stdout)}`, task.stdout.text, live);
    if (task.stderr) yield* block(`stderr${size(task.stderr)}`, task.stderr.text, live);
    for (const rank of task.ranks ?? []) {
      const text = [rank.error, rank.stdout, rank.stderr].filter(Boolean).join("\n");
      if (text && task.ranks.length > 1) yield* block(`Rank ${rank.rank}${rank.host ? ` on ${rank.host}` : ""}`, text);
    }
    if (!this.hasEnded(task) && this.source.mayCancel) yield this.cancelingOf(task);
  }

  /** The one button of a task, which a refresh leaves as it is. */
  cancelingOf(task) {
    if (this.canceled?.uid !== task.uid) this.canceled = { uid: task.uid, place: this.canceling(`Cancel ${task.name}`, { session: this.query.session, tasks: task.uid }) };
    return this.canceled.place;
  }

  /** A button that asks before it cancels. */
  canceling(words, query) {
    const place = make("p");
    const ask = make("button", { text: words, click: () => {
      place.replaceChildren(
        make("span", { text: `${words}? What it did so far is lost. ` }),
        make("button", { text: "Yes, cancel", click: async () => {
          try {
            await this.source.act("cancel", query);
            place.replaceChildren(make("span", { text: "Canceled." }));
          } catch (error) {
            place.replaceChildren(make("span", { text: error.message }));
          }
        } }),
        " ",
        make("button", { text: "No", click: () => place.replaceChildren(ask) }),
      );
    } });
    place.append(ask);
    return place;
  }
}
