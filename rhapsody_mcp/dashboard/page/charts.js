// Curves over time: states, cores, GPUs, memory and tokens, computed from the columns of the task stream.

const POINTS = 240;

/** Sums of intervals over time: add(from, to, amount), then values() at the points. */
class Steps {
  constructor(first, last) {
    this.first = first;
    this.step = (last - first) / (POINTS - 1);
    this.changes = new Float64Array(POINTS + 1);
  }

  index(time) {
    return Math.max(0, Math.min(POINTS, Math.ceil((time - this.first) / this.step)));
  }

  /** Counts at each point that lies in the interval. */
  add(from, to, amount = 1) {
    this.changes[this.index(from)] += amount;
    this.changes[this.index(to)] -= amount;
  }

  values() {
    let sum = 0;
    return Array.from(this.changes.subarray(0, POINTS), (change) => (sum = Math.abs(sum + change) < 1e-9 ? 0 : sum + change));
  }
}

/** Levels of intervals, averaged over each step: a level that lasts half a step counts half. */
class Levels extends Steps {
  constructor(first, last) {
    super(first, last);
    this.parts = new Float64Array(POINTS + 1);
  }

  add(from, to, level = 1) {
    const place = (time) => Math.max(0, Math.min(POINTS, (time - this.first) / this.step));
    const [a, b] = [place(from), place(to)];
    const [start, end] = [Math.floor(a), Math.floor(b)];
    if (start === end) this.parts[start] += level * (b - a);
    else {
      this.parts[start] += level * (start + 1 - a);
      this.parts[end] += level * (b - end);
      this.changes[start + 1] += level;
      this.changes[end] -= level;
    }
  }

  /** Adds an amount that came about evenly in the interval; the values are amounts a second. */
  spread(from, to, amount) {
    const wide = Math.max(to - from, 1e-3 * this.step);
    this.add(from, from + wide, amount / wide);
  }

  values() {
    return super.values().map((value, index) => value + this.parts[index]);
  }
}

class Charts {
  constructor(place, spans) {
    Object.assign(this, { place, spans });
    this.plots = new Map();
    new ResizeObserver(() => this.resize()).observe(place);
  }

  /** Draws all curves over the time that the task stream shows; each chart is there once it has something to show. */
  show(head, [first, now]) {
    if (!head || now <= first) return;
    this.zero = head.first ?? first;
    const time = Array.from({ length: POINTS }, (_, index) => first + ((now - first) * index) / (POINTS - 1));
    this.states(head, time, first, now);
    this.amounts(head, time, first, now);
  }

  states(head, time, first, now) {
    const { spans } = this;
    const [waiting, ended, failed] = [1, 2, 3].map(() => new Steps(first, now));
    const running = new Levels(first, now);
    const past = now + (now - first);
    for (let row = 0; row < spans.rows; row++) {
      if (spans.state[row] & MORE_RANKS) continue;
      const end = spans.ended[row];
      const start = end - spans.execution[row];
      waiting.add(start - spans.queue[row], start);
      if (spans.lane[row] !== NO_LANE) running.add(start, end);
      ended.add(end, past);
      if (spans.state[row] === 1) failed.add(end, past);
    }
    for (const task of head.running) running.add(task.started, past);
    const unlisted = (head.counts.RUNNING ?? 0) - head.running.length; // the list of running tasks is bounded
    if (unlisted > 0) running.add(Math.max(...head.running.map((task) => task.started)), past, unlisted);
    for (const [submitted, count] of head.waiting_since) waiting.add(submitted, past, count);
    this.draw("States", time, [
      { label: "running", color: "--running", values: running.values(), fill: true },
      { label: "waiting or queued", color: "--queued", values: waiting.values() },
      { label: "ended", color: "--done", values: ended.values(), scale: "ended" },
      { label: "failed", color: "--failed", values: failed.values(), scale: "ended" },
    ]);
  }

  amounts(head, time, first, now) {
    const { spans } = this;
    const [reserved, gpus, memory, used, tokensIn, tokensOut] = Array.from({ length: 6 }, () => new Levels(first, now));
    const started = (row) => spans.ended[row] - spans.execution[row];
    for (let row = 0; row < spans.rows; row++) {
      if (spans.lane[row] === NO_LANE) continue;
      const start = started(row);
      if (spans.lanes[spans.lane[row]].kind === "worker") reserved.add(start, spans.ended[row]);
      if (!Number.isNaN(spans.cpu[row]) && !(spans.state[row] & MORE_RANKS)) used.spread(start, spans.ended[row], spans.cpu[row]);
    }
    let anyGpu = false, anyMemory = false;
    for (const [number, cores, gpu, gigabytes] of spans.processes) {
      const row = number - spans.first;
      if (row < 0 || spans.lane[row] === NO_LANE) continue;
      reserved.add(started(row), spans.ended[row], cores);
      if (gpu) (anyGpu = true), gpus.add(started(row), spans.ended[row], gpu);
      if (gigabytes) (anyMemory = true), memory.add(started(row), spans.ended[row], gigabytes);
    }
    for (const task of head.running) {
      const needs = task.needs ?? { cores: spans.lanes[task.lane]?.kind === "prompt" ? 0 : 1, gpus: 0 };
      reserved.add(task.started, now + 1, needs.cores);
      if (needs.gpus) (anyGpu = true), gpus.add(task.started, now + 1, needs.gpus);
    }
    const there = (key) => head.backends.reduce((most, backend) => Math.max(most, backend[key] ?? 0), 0);
    const total = (key) => (there(key) ? [{ label: `there are`, color: "--dim", values: time.map(() => there(key)), dash: [4, 4] }] : []);
    const cores = reserved.values();
    const cpu = used.values();
    if (cores.some(Boolean) || cpu.some(Boolean))
      this.draw("Cores", time, [
        { label: "held by tasks", color: "--running", values: cores, fill: true },
        { label: "used (measured, of ended tasks)", color: "--done", values: cpu },
        ...total("cores"),
      ]);
    if (anyGpu) this.draw("GPUs", time, [{ label: "held by tasks", color: "--running", values: gpus.values(), fill: true }, ...total("gpus")]);
    if (anyMemory) this.draw("Memory, GB", time, [{ label: "peaks of the processes that ran", color: "--running", values: memory.values(), fill: true }, ...total("memory_gb")]);
    for (const [number, into, out] of spans.tokens) {
      const row = number - spans.first;
      if (row < 0) continue;
      tokensIn.spread(started(row), spans.ended[row], into);
      tokensOut.spread(started(row), spans.ended[row], out);
    }
    if (spans.tokens.length)
      this.draw("Tokens a second", time, [
        { label: "into the model", color: "--queued", values: tokensIn.values() },
        { label: "out of it", color: "--accent", values: tokensOut.values(), fill: true },
      ]);
  }

  draw(title, time, curves) {
    const data = [time, ...curves.map((curve) => curve.values)];
    const key = curves.map((curve) => curve.label).join();
    const known = this.plots.get(title);
    if (known?.key === key) return known.plot.setData(data);
    known?.plot.destroy();
    const box = known?.box ?? make("div", {}, make("h2", { text: title }));
    if (!known) this.place.append(box);
    const plot = new uPlot(this.options(box, curves), data, box);
    this.plots.set(title, { plot, box, key, title });
  }

  options(box, curves) {
    const grid = { stroke: () => cssColor("--line"), width: 1 };
    const axis = { stroke: () => cssColor("--dim"), grid, ticks: grid, font: "11px system-ui, 'DejaVu Sans', sans-serif" };
    const relative = (_, ticks, __, ___, step) => ticks.map((tick) => tickText(tick - this.zero, step));
    const splits = (_, __, least, most, step) => {
      const ticks = [];
      const zero = this.zero;
      for (let tick = Math.ceil((least - zero) / step) * step; tick <= most - zero; tick += step) ticks.push(tick + zero);
      return ticks;
    };
    const second = curves.some((curve) => curve.scale);
    return {
      width: Math.max(200, box.clientWidth),
      height: 170,
      cursor: { drag: { x: false, y: false }, points: { size: 6 } },
      legend: { live: true },
      scales: { x: { time: false, range: (_, least, most) => [least, most] }, y: { range: (_, __, most) => [0, (most || 1) * 1.08] }, ended: { range: (_, __, most) => [0, (most || 1) * 1.08] } },
      axes: [
        { ...axis, values: relative, splits, space: 70 },
        { ...axis, size: 56, values: (_, ticks) => ticks.map(compact) },
        ...(second ? [{ ...axis, side: 1, scale: "ended", size: 48, grid: { show: false }, values: (_, ticks) => ticks.map(compact) }] : []),
      ],
      series: [
        { label: "at", value: (_, value) => (value === null ? "–" : seconds(value - this.zero)) },
        ...curves.map((curve) => ({
          label: curve.label,
          scale: curve.scale ?? "y",
          stroke: () => cssColor(curve.color),
          fill: curve.fill ? () => `${cssColor(curve.color)}33` : undefined,
          width: 1.5,
          dash: curve.dash,
          points: { show: false },
          value: (_, value) => plain(value),
        })),
      ],
    };
  }

  resize() {
    for (const { plot, box } of this.plots.values()) plot.setSize({ width: Math.max(200, box.clientWidth), height: 170 });
  }

  /** Takes all away, as for another session. */
  clear() {
    for (const { plot, box } of this.plots.values()) plot.destroy(), box.remove();
    this.plots.clear();
  }

  recolor() {
    for (const { plot } of this.plots.values()) plot.redraw(false);
  }
}
