// The task stream: a lane a worker, process, rank or prompt, drawn on a canvas from counts of each pixel.

const GUTTER = 108;
const AXIS = 20;

class Stream {
  constructor(canvas, tip, spans, onOpen) {
    Object.assign(this, { canvas, tip, spans, onOpen });
    this.head = null;
    this.window = null; // [from, to] in seconds since the epoch, null for all
    this.follow = true;
    this.only = null; // the group that is shown in colour, null for all
    this.listen();
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  // --- what is shown

  get lanes() {
    return this.spans.order;
  }

  range() {
    const { head, spans } = this;
    const now = this.now();
    const first = head?.first ?? now - 1;
    const ended = spans.rows ? spans.ended[spans.rows - 1] : first + 1e-3;
    const last = head && head.running.length && !head.closed ? now : Math.max(ended, ...(head?.running ?? []).map((task) => task.started));
    return [first, Math.max(last, first + 1e-3)];
  }

  now() {
    if (!this.head) return Date.now() / 1000;
    return this.isStill ? this.head.now : this.head.now + (performance.now() - this.headAt) / 1000;
  }

  view() {
    const [first, last] = this.range();
    if (!this.window) return [first, last + (last - first) * 0.01];
    if (this.follow) return [last - (this.window[1] - this.window[0]), last];
    return this.window;
  }

  show(head) {
    this.head = head;
    this.headAt = performance.now();
    this.draw();
  }

  zoom(factor, at) {
    const [from, to] = this.view();
    const center = at ?? (this.follow && this.window ? to : (from + to) / 2);
    const [first, last] = this.range();
    const span = (to - from) * factor;
    if (span >= (last - first) * 1.02) return this.fit();
    this.follow = this.follow && at === undefined;
    const share = (center - from) / (to - from);
    this.window = [center - Math.max(span, 1e-5) * share, center + Math.max(span, 1e-5) * (1 - share)];
    this.draw();
  }

  move(share) {
    const [from, to] = this.view();
    const [first, last] = this.range();
    const least = 0.1 * (to - from); // of the picture, so much shows something
    const step = Math.max(first - to + least, Math.min(last - from - least, share * (to - from)));
    this.follow = false;
    this.window = [from + step, to + step];
    this.draw();
  }

  fit() {
    this.window = null;
    this.follow = true;
    this.draw();
  }

  followNow() {
    const [from, to] = this.view();
    this.window = this.window ?? [from, to];
    this.follow = true;
    this.draw();
  }

  // --- drawing

  draw() {
    if (this.drawing) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = 0;
      this.paint();
      this.onView?.();
    });
  }

  size() {
    const lanes = Math.max(1, this.lanes.length);
    const width = Math.max(200, this.canvas.parentElement.clientWidth - 2);
    const height = Math.round(Math.min(Math.max(lanes * 20, 90), Math.max(360, Math.min(lanes * 4, 900)))) + AXIS;
    return { width, height, laneHeight: (height - AXIS) / lanes, gutter: width < 520 ? 64 : GUTTER };
  }

  paint(canvas = this.canvas, scale = Math.min(2, window.devicePixelRatio || 1)) {
    const size = this.size();
    const { width, height, gutter } = size;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    const back = cssColor("--back");
    context.fillStyle = back;
    context.fillRect(0, 0, canvas.width, canvas.height);
    const [from, to] = this.view();
    const x0 = Math.round(gutter * scale);
    const columns = canvas.width - x0;
    this.paintSpans(context, x0, columns, Math.round((height - AXIS) * scale), from, to);
    context.setTransform(scale, 0, 0, scale, 0, 0);
    this.paintRunning(context, size, from, to);
    this.paintAxis(context, size, from, to);
    this.paintLabels(context, size);
    this.describe();
  }

  /** Adds up, for each lane and pixel, how much of its time was used and by which group most, then paints the sums. */
  paintSpans(context, x0, columns, height, from, to) {
    const { spans, only } = this;
    const lanes = this.lanes.length;
    if (!lanes || columns < 1) return;
    const covered = new Float32Array(lanes * columns);
    const most = new Float32Array(lanes * columns);
    const group = new Uint16Array(lanes * columns);
    const failed = new Uint8Array(lanes * columns);
    const place = new Int32Array(spans.lanes.length);
    this.lanes.forEach((lane, position) => (place[lane] = position));
    const perSecond = columns / (to - from);
    for (let row = 0; row < spans.rows; row++) {
      const lane = spans.lane[row];
      const ended = spans.ended[row];
      if (lane === NO_LANE || ended < from) continue;
      const started = ended - spans.execution[row];
      if (started > to) continue;
      const base = place[lane] * columns;
      const left = Math.max(0, (started - from) * perSecond);
      const right = Math.min(columns, Math.max((ended - from) * perSecond, left + 1e-6));
      const bad = (spans.state[row] & ~MORE_RANKS) === 1;
      for (let x = Math.floor(left); x < right && x < columns; x++) {
        const share = Math.min(right, x + 1) - Math.max(left, x);
        const cell = base + x;
        covered[cell] += share;
        if (share > most[cell]) {
          most[cell] = share;
          group[cell] = spans.group[row];
        }
        if (bad) failed[cell] = 1;
      }
    }
    const { colors } = spans;
    const red = cssColor("--failed");
    const image = context.createImageData(columns, height);
    const memory = new Uint32Array(image.data.buffer);
    const background = pixel(cssColor("--back"), 1);
    memory.fill(background);
    for (let lane = 0; lane < lanes; lane++) {
      const top = Math.floor((lane * height) / lanes);
      const end = Math.max(top + 1, Math.floor(((lane + 1) * height) / lanes));
      const bottom = end - top > 5 ? end - 2 : end - top > 2 ? end - 1 : end;
      for (let x = 0; x < columns; x++) {
        const cell = lane * columns + x;
        if (!covered[cell]) continue;
        const isOther = only !== null && only !== group[cell];
        const alpha = Math.min(1, 0.35 + 0.65 * covered[cell]) * (isOther ? 0.15 : 1);
        const color = blend(background, pixel(failed[cell] && !isOther ? red : colors[group[cell]] ?? "#888888", 1), alpha);
        for (let y = top; y < bottom && y < height; y++) memory[y * columns + x] = color;
      }
    }
    context.putImageData(image, x0, 0);
  }

  paintRunning(context, { width, laneHeight, gutter }, from, to) {
    if (!this.head) return;
    const perSecond = (width - gutter) / (to - from);
    const now = this.now();
    for (const task of this.head.running) {
      const position = this.lanes.indexOf(task.lane);
      if (position < 0 || task.started > to) continue;
      const left = gutter + Math.max(0, (task.started - from) * perSecond);
      const right = gutter + Math.min(width - gutter, (now - from) * perSecond);
      const tall = Math.max(1, laneHeight - (laneHeight > 5 ? 2 : 0));
      context.globalAlpha = this.only !== null && this.only !== task.group ? 0.12 : 0.6;
      context.fillStyle = this.spans.colors[task.group] ?? "#888888";
      context.fillRect(left, position * laneHeight, Math.max(1, right - left), tall);
      context.globalAlpha = 1;
      context.fillStyle = cssColor("--running");
      if (right > left) context.fillRect(Math.max(left, right - 2), position * laneHeight, 2, tall);
    }
  }

  paintAxis(context, { width, height, gutter }, from, to) {
    const start = this.head?.first ?? from;
    const step = niceStep((to - from) / Math.max(2, (width - gutter) / 90));
    context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
    context.fillStyle = cssColor("--dim");
    context.strokeStyle = cssColor("--line");
    context.lineWidth = 1;
    context.beginPath();
    for (let tick = Math.ceil((from - start) / step) * step; tick <= to - start; tick += step) {
      const x = gutter + ((tick + start - from) / (to - from)) * (width - gutter);
      context.moveTo(x, height - AXIS);
      context.lineTo(x, height - AXIS + 4);
      const text = tickText(tick, step);
      context.fillText(text, Math.min(x + 2, width - context.measureText(text).width - 2), height - 5);
    }
    context.moveTo(gutter, height - AXIS);
    context.lineTo(width, height - AXIS);
    context.stroke();
  }

  paintLabels(context, { laneHeight, gutter }) {
    const several = new Set(this.spans.lanes.map((lane) => lane.backend)).size > 1;
    const every = Math.max(1, Math.ceil(13 / laneHeight));
    context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
    context.fillStyle = cssColor("--dim");
    this.lanes.forEach((lane, position) => {
      if (position % every) return;
      const text = shortened(context, this.spans.laneName(lane, several), gutter - 6);
      context.fillText(text, 3, position * laneHeight + Math.min(laneHeight / 2 + 4, 13));
    });
  }

  describe() {
    const { spans, head } = this;
    const text = `${spans.rows} runs of tasks in ${this.lanes.length} lanes, ${head?.running.length ?? 0} running`;
    if (this.canvas.getAttribute("aria-label") !== text) this.canvas.setAttribute("aria-label", text);
  }

  // --- mouse and keyboard

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const { width, laneHeight, gutter } = this.size();
    const [from, to] = this.view();
    const x = ((event.clientX - box.left) / box.width) * width;
    const perPixel = (to - from) / (width - gutter);
    return { x, lane: this.lanes[Math.floor((event.clientY - box.top) / laneHeight)], time: from + (x - gutter) * perPixel, perPixel };
  }

  /** What is drawn at a place: {row} of a span, or {task} that runs; null for nothing. */
  hit(event) {
    const { lane, time, perPixel, x } = this.at(event);
    if (lane === undefined || x < 0) return null;
    const task = this.head?.running.find((one) => one.lane === lane && one.started - 2 * perPixel <= time && time <= this.now());
    const row = this.spans.find(lane, time, task ? 0 : 2 * perPixel);
    return row >= 0 ? { row } : task ? { task } : null;
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey && document.activeElement !== canvas) return; // else a page with a canvas could not be scrolled
      event.preventDefault();
      if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) return this.move((event.deltaX || event.deltaY) / 1000);
      this.zoom(Math.exp(Math.sign(event.deltaY) * 0.25), this.at(event).time);
    }, { passive: false });
    let drag = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      drag = { x: event.clientX, moved: false };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointercancel", () => (drag = null));
    canvas.addEventListener("pointermove", (event) => {
      if (!drag) return this.hover(event);
      const step = event.clientX - drag.x;
      if (!drag.moved && Math.abs(step) < 4) return;
      drag = { x: event.clientX, moved: true };
      this.move(-step / this.size().width);
    });
    canvas.addEventListener("pointerup", (event) => {
      const found = drag && !drag.moved ? this.hit(event) : null;
      drag = null;
      if (found) this.onOpen(found.task ? { uid: found.task.uid } : { row: this.spans.first + found.row });
    });
    canvas.addEventListener("pointerleave", () => (this.tip.hidden = true));
    canvas.addEventListener("dblclick", () => this.fit());
    canvas.addEventListener("keydown", (event) => {
      const act = { ArrowLeft: () => this.move(-0.2), ArrowRight: () => this.move(0.2), "+": () => this.zoom(0.6), "=": () => this.zoom(0.6), "-": () => this.zoom(1.6), Home: () => this.fit(), End: () => this.followNow() }[event.key];
      if (!act) return;
      event.preventDefault();
      act();
    });
  }

  hover(event) {
    const found = this.hit(event);
    const { spans } = this;
    this.tip.hidden = !found;
    if (!found) return;
    const text = found.task
      ? `${found.task.name}\nrunning for ${seconds(this.now() - found.task.started)}`
      : `${spans.groups[spans.group[found.row]]}\n${STATES[spans.state[found.row] & ~MORE_RANKS]}, queue ${seconds(spans.queue[found.row])}, execution ${seconds(spans.execution[found.row])}`;
    if (this.tip.textContent !== text) this.tip.textContent = text;
    const box = this.canvas.getBoundingClientRect();
    this.tip.style.left = `${Math.max(0, Math.min(event.clientX - box.left + 12, box.width - 220))}px`;
    this.tip.style.top = `${event.clientY - box.top + 14}px`;
  }

  // --- pictures

  png() {
    const canvas = document.createElement("canvas");
    this.paint(canvas, 2);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }
}

function blend(back, color, alpha) {
  let mixed = 0xff000000;
  for (const shift of [0, 8, 16]) {
    const [low, high] = [(back >> shift) & 255, (color >> shift) & 255];
    mixed |= Math.round(low + (high - low) * alpha) << shift;
  }
  return mixed >>> 0;
}

function niceStep(raw) {
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((one) => one * power >= raw) * power;
  return step >= 60 ? [60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400, 7 * 86400, 30 * 86400].find((one) => one >= raw) ?? step : step;
}

function tickText(value, step) {
  if (step >= 60) {
    const all = Math.round(value / 60);
    const [hours, minutes] = [Math.floor(all / 60), all % 60];
    return hours ? `${hours} h${minutes ? ` ${minutes} min` : ""}` : `${minutes} min`;
  }
  if (step >= 0.01) return `${+value.toFixed(Math.max(0, Math.ceil(-Math.log10(step)) + 1))} s`;
  return `${+(value * 1000).toFixed(3)} ms`;
}

function shortened(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let end = text.length;
  while (end > 1 && context.measureText(`…${text.slice(-end)}`).width > width) end--;
  return `…${text.slice(-end)}`;
}
