// The graph of tasks or groups, in layers from left to right.

const NODE = { width: 148, height: 38, gapX: 54, gapY: 12 };

/** The layer of each node: one more than the highest of its sources; a circle of groups is cut where it is met again. */
function layersOf(nodes, edges) {
  const sources = new Map(nodes.map((node) => [node.id, []]));
  for (const [source, target] of edges) if (sources.has(source)) sources.get(target)?.push(source);
  const layers = new Map();
  const visit = (start) => {
    const pending = [[start, 0]];
    const open = new Set();
    while (pending.length) {
      const top = pending[pending.length - 1];
      const [id, next] = top;
      if (next === 0) open.add(id);
      const before = sources.get(id);
      if (next < before.length) {
        top[1]++;
        if (!layers.has(before[next]) && !open.has(before[next])) pending.push([before[next], 0]);
        continue;
      }
      layers.set(id, Math.max(-1, ...before.map((source) => layers.get(source) ?? -1)) + 1);
      open.delete(id);
      pending.pop();
    }
  };
  for (const node of nodes) if (!layers.has(node.id)) visit(node.id);
  return layers;
}

/** The place of each node: within a layer, near the middle of its neighbours. */
function placesOf(nodes, edges) {
  const layers = layersOf(nodes, edges);
  const columns = [];
  for (const node of nodes) (columns[layers.get(node.id)] ??= []).push(node.id);
  const row = new Map();
  const number = () => columns.forEach((column) => column.forEach((id, position) => row.set(id, position)));
  number();
  const neighbours = new Map(nodes.map((node) => [node.id, []]));
  for (const [source, target] of edges) neighbours.get(source)?.push(target), neighbours.get(target)?.push(source);
  for (let sweep = 0; sweep < 4; sweep++) {
    for (const column of columns) {
      const middle = (id) => {
        const rows = neighbours.get(id).filter((other) => row.has(other)).map((other) => row.get(other));
        return rows.length ? rows.reduce((sum, one) => sum + one, 0) / rows.length : row.get(id);
      };
      const middles = new Map(column.map((id) => [id, middle(id)]));
      column.sort((a, b) => middles.get(a) - middles.get(b));
    }
    number();
  }
  const tallest = Math.max(...columns.map((column) => column.length));
  const places = new Map();
  columns.forEach((column, layer) => column.forEach((id, position) => {
    const top = ((tallest - column.length) * (NODE.height + NODE.gapY)) / 2;
    places.set(id, { x: 12 + layer * (NODE.width + NODE.gapX), y: 12 + top + position * (NODE.height + NODE.gapY) });
  }));
  return { places, width: 24 + columns.length * (NODE.width + NODE.gapX) - NODE.gapX, height: 24 + tallest * (NODE.height + NODE.gapY) - NODE.gapY };
}

function showGraph(place, note, graph, onTask, onGroup) {
  const { nodes, edges } = graph;
  const { places, width, height } = placesOf(nodes, edges);
  const onPath = new Set(nodes.filter((node) => node.path).map((node) => node.id));
  const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${nodes.length} ${graph.of}, ${edges.length} edges` });
  for (const [source, target] of edges) {
    const [a, b] = [places.get(source), places.get(target)];
    if (!a || !b) continue;
    const [x1, y1, x2, y2] = [a.x + NODE.width, a.y + NODE.height / 2, b.x, b.y + NODE.height / 2];
    const bend = Math.max(24, Math.abs(x2 - x1) / 2);
    const isPath = onPath.has(source) && onPath.has(target);
    picture.append(svg("path", { d: `M${x1},${y1}C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`, class: isPath ? "path" : null }));
  }
  for (const node of nodes) picture.append(nodeOf(node, places.get(node.id), graph.of === "tasks" ? onTask : onGroup));
  place.replaceChildren(picture);
  const left = [graph.left_out && `${graph.left_out} smaller groups`, graph.edges_left_out && `${graph.edges_left_out} edges`].filter(Boolean).join(" and ");
  note.textContent = `${graph.of === "tasks" ? "Each box is a task or a for_each" : "Each box is a group of tasks"}; the critical path is in blue.${left && ` Left out: ${left}.`}`;
}

function nodeOf(node, { x, y }, onClick) {
  const counts = Object.entries(node.counts);
  const ended = STATES.reduce((sum, state) => sum + (node.counts[state] ?? 0), 0);
  let words = node.total === 1 ? (counts[0]?.[0] ?? "").toLowerCase() : `${ended} of ${node.total} ended`;
  if (node.replaced) words += ", replaced by a later task";
  const group = svg("g", { class: `node${node.path ? " path" : ""}`, transform: `translate(${x},${y})`, tabindex: 0, role: "button", "aria-label": `${node.name}: ${words}`, click: () => onClick(node), keydown: (event) => event.key === "Enter" && onClick(node) });
  group.append(svg("rect", { width: NODE.width, height: NODE.height, rx: 6 }));
  group.append(svg("title", { text: `${node.name}: ${words}` }));
  group.append(svg("text", { x: 8, y: 15, text: node.name.length > 20 ? `${node.name.slice(0, 19)}…` : node.name }));
  group.append(svg("text", { x: 8, y: 28, class: "small", text: words }));
  let left = 1;
  for (const [state, count] of counts) {
    const wide = ((NODE.width - 2) * count) / Math.max(1, node.total);
    const bar = svg("rect", { x: left, y: NODE.height - 5, width: wide, height: 4 });
    bar.style.cssText = `fill: ${stateColor(state)}; stroke: none`;
    group.append(bar);
    left += wide;
  }
  return group;
}
