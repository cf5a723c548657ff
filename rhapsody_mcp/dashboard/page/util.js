// Elements, texts and colours. Every text is set as text: nothing that a task prints is read as markup.

const byId = (id) => document.getElementById(id);

/** An element with attributes; `text` sets its text, a function is a listener, other falsy values are left out. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (typeof value === "function") element.addEventListener(name, value);
    else if (name === "style") Object.entries(value).forEach(([key, one]) => element.style.setProperty(key, one));
    else if (value === true) element.setAttribute(name, "");
    else if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

let pressed = false;
addEventListener("pointerdown", () => (pressed = true), true);
for (const end of ["pointerup", "pointercancel", "blur"]) addEventListener(end, () => setTimeout(() => (pressed = false)), true);

/**
 * Replaces the children of an element where its content has changed, which `key` tells. What a person is pressing stays
 * until the next frame, and the focus stays where it was.
 */
function fill(element, key, children) {
  if (element.dataset.key === key || (pressed && element.matches(":hover"))) return;
  element.dataset.key = key;
  const places = () => [...element.querySelectorAll("button, summary")];
  const focused = element.contains(document.activeElement) ? places().indexOf(document.activeElement) : -1;
  element.replaceChildren(...children());
  if (focused >= 0) places()[Math.min(focused, places().length - 1)]?.focus({ preventScroll: true });
}

/** Fewer in a chat, whose height the page shares. */
const ROWS_A_PAGE = document.documentElement.dataset.source === "app" ? 10 : 50;
const STATES = ["DONE", "FAILED", "CANCELED", "skipped"];
const stateColor = (state) => `var(--${state.toLowerCase()})`;
const cssColor = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function seconds(value) {
  if (value === undefined || value === null || Number.isNaN(value)) return "–";
  const [whole, minutes] = [Math.round(value), Math.round(value / 60)];
  if (minutes >= 1440) return `${(value / 86400).toFixed(1)} d`;
  if (minutes >= 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  if (whole >= 100) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (value >= 1) return `${value.toFixed(2)} s`;
  return value >= 0.01 ? `${(value * 1000).toFixed(0)} ms` : `${(value * 1000).toFixed(2)} ms`;
}

const plain = (value) =>
  value === undefined || value === null ? "–" : value >= 1000 ? Math.round(value).toLocaleString("en") : +value.toPrecision(3) + "";
const compact = (value) => (value >= 1000 ? new Intl.NumberFormat("en", { notation: "compact" }).format(value) : plain(value));
const clock = (time) => new Date(time * 1000).toLocaleTimeString();
const moment = (time) => new Date(time * 1000).toLocaleString();
const byteCount = (text) => new TextEncoder().encode(text).length;

const PALETTE = [
  "#4e79a7", "#f28e2b", "#76b7b2", "#59a14f", "#b07aa1", "#edc948", "#9c755f", "#ff9da7", "#3d9bb3", "#a7b34e",
  "#7a6bc2", "#c96f9c", "#6b9e78", "#d2a35b", "#5b8fd0", "#8c8c3f", "#8a5fb0", "#4aa38f", "#937bb0", "#7f8fa6",
];

/** The colours of groups: each by its name, so that it is much the same in every picture, and no two alike while there are others. */
function groupColors(names) {
  const taken = new Set();
  return names.map((name) => {
    let hash = 2166136261;
    for (let at = 0; at < name.length; at++) hash = Math.imul(hash ^ name.charCodeAt(at), 16777619);
    let place = (hash >>> 0) % PALETTE.length;
    while (taken.has(place) && taken.size < PALETTE.length) place = (place + 7) % PALETTE.length;
    taken.add(place);
    return PALETTE[place];
  });
}

/** The pixel of a canvas's memory for a colour such as #4e79a7 or #fff; alpha from 0 to 1. */
function pixel(color, alpha) {
  const digits = color.length === 4 ? color.replace(/[^#]/g, "$&$&") : color;
  const number = parseInt(digits.slice(1), 16);
  return ((Math.round(alpha * 255) << 24) | ((number & 255) << 16) | (number & 0xff00) | (number >> 16)) >>> 0;
}

function save(name, type, content) {
  const link = make("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
