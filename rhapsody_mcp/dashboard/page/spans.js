// The columns of the task stream, as the server sends them.

const MORE_RANKS = 0x80;
const NO_LANE = 0xffff;
const COLUMNS = { ended: Float64Array, queue: Float32Array, execution: Float32Array, cpu: Float32Array, lane: Uint16Array, group: Uint16Array, state: Uint8Array };

function decode(text, Type) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Type(bytes.buffer);
}

class Spans {
  constructor() {
    this.clear(0);
  }

  clear(first) {
    this.first = first; // the number of the first row that is here
    this.rows = 0;
    this.lanes = [];
    this.order = [];
    this.groups = [];
    this.colors = [];
    this.processes = [];
    this.tokens = [];
    for (const name in COLUMNS) this[name] = new COLUMNS[name](1024);
  }

  apply(block) {
    if (block.reset) this.clear(block.first);
    this.lanes.push(...block.lanes.map(([backend, node, kind, number]) => ({ backend, node, kind, number })));
    this.groups.push(...block.groups);
    if (block.groups.length) this.colors = groupColors(this.groups);
    this.order = block.order;
    if (block.rows) this.append(block);
  }

  append(block) {
    for (const name in COLUMNS) {
      const added = decode(block[name], COLUMNS[name]);
      if (this.rows + block.rows > this[name].length) {
        const larger = new COLUMNS[name](Math.max(this[name].length * 2, this.rows + block.rows));
        larger.set(this[name].subarray(0, this.rows));
        this[name] = larger;
      }
      this[name].set(added, this.rows);
    }
    this.rows += block.rows;
    this.processes.push(...block.processes);
    this.tokens.push(...block.tokens);
  }

  /** Puts older rows before the ones that are here. */
  prepend(block) {
    for (const name in COLUMNS) {
      const whole = new COLUMNS[name](this.rows + block.rows);
      whole.set(decode(block[name], COLUMNS[name]));
      whole.set(this[name].subarray(0, this.rows), block.rows);
      this[name] = whole;
    }
    this.first = block.first;
    this.rows += block.rows;
    this.processes = [...block.processes, ...this.processes];
    this.tokens = [...block.tokens, ...this.tokens];
  }

  laneName(number, several) {
    const lane = this.lanes[number];
    const place = [several || lane.kind === "prompt" ? lane.backend : "", lane.node].filter(Boolean).join(" ");
    const kind = lane.kind === "ended worker" ? "lost worker" : lane.kind;
    return `${place ? place + " " : ""}${kind} ${lane.number}`;
  }

  /** The row whose span covers a time in a lane, or comes nearest within a tolerance in seconds; -1 for none. */
  find(lane, time, tolerance) {
    let best = -1;
    let nearest = tolerance;
    for (let row = this.rows - 1; row >= 0; row--) {
      if (this.lane[row] !== lane) continue;
      const started = this.ended[row] - this.execution[row];
      const distance = time < started ? started - time : time > this.ended[row] ? time - this.ended[row] : 0;
      if (distance <= nearest) {
        if (distance === 0) return row;
        [best, nearest] = [row, distance];
      }
    }
    return best;
  }
}
