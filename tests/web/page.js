// What the tests ask of ComfyUI's page; it is there before the page's own scripts.
window.tests = {
  ready: () => window.app?.graph && app.extensionManager && Object.keys(LiteGraph.registered_node_types).length > 300,

  node: (kind) => app.graph.nodes.find((node) => node.type === kind),
  widget: (kind, name) => tests.node(kind)?.widgets.find((widget) => widget.name === name),
  unknown: () => app.graph.nodes.map((node) => node.type).filter((kind) => !(kind in LiteGraph.registered_node_types)),

  texts() {
    const nodes = app.canvas.graph.nodes.map((node) => [node.id, node.widgets?.find((w) => w.name === "$$node-text-preview")]);
    return Object.fromEntries(nodes.filter(([, widget]) => widget?.value).map(([id, widget]) => [id, widget.value]));
  },

  // The lines on a node as they are drawn: whether each is marked, all of it is to be seen, and its words are whole.
  lines(kind) {
    const { element } = tests.widget(kind, "$$node-text-preview");
    const frame = (element.closest("[data-node-id]") ?? element).getBoundingClientRect();
    return [...element.children].map((line) => ({
      text: line.textContent,
      marked: getComputedStyle(line).borderLeftStyle === "solid",
      visible: line.getBoundingClientRect().bottom <= frame.bottom + 1 && element.scrollHeight <= element.clientHeight,
      whole: tests.words(line.firstChild).every((word) => word.getClientRects().length === 1),
    }));
  },
  words: (text) =>
    [...text.data.matchAll(/\S+/g)].map(({ index, 0: word }) => {
      const range = new Range();
      range.setStart(text, index);
      range.setEnd(text, index + word.length);
      return range;
    }),

  // The width of a template's picture in the template browser.
  thumbnail: (name) => document.querySelector(`[data-testid="template-workflow-${name}"] img`)?.naturalWidth,

  // Have the page take in all changes of the open graph. It looks at them once more 50 ms later, and would take for a
  // change of this graph what it is given in the meantime: see settle() in frontend.py.
  take() {
    const tracker = app.extensionManager.workflow.activeWorkflow?.changeTracker;
    (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker); // its older name
  },

  // Put a new node beside the others, with these values of its widgets.
  add(kind, widgets) {
    const node = LiteGraph.createNode(kind);
    node.pos = [Math.max(0, ...app.graph.nodes.map((each) => each.pos[0] + each.size[0] + 40)), 0];
    app.graph.add(node);
    tests.give(kind, widgets);
  },
  give(kind, widgets) {
    for (const [name, value] of Object.entries(widgets)) tests.widget(kind, name).value = value;
  },
  // Lines as the page shows them in a language; our scripts are where the host has them.
  async translated(language, lines) {
    const folder = (await app.api.getExtensions()).find((path) => path.endsWith("/phrasebook.js")).replace(/[^/]+$/, "");
    const { Phrasebook } = await import(app.api.fileURL(`${folder}phrasebook.js`));
    const table = await (await fetch(app.api.fileURL(`${folder}words.json`))).json();
    const book = new Phrasebook(table, language);
    return lines.map((line) => book.line(line));
  },

  write: (kind, text) => (tests.widget(kind, "$$node-text-preview").value = text),
  heights: (kind) => [tests.node(kind).size[1], tests.node(kind).computeSize()[1]],

  // The graph that is open is about to be replaced; later: whether it has been.
  leave: () => (tests.left = new Set(app.graph.nodes)),
  arrived: () => app.graph.nodes.length && !app.graph.nodes.some((node) => tests.left.has(node)),

  // Where a node's title is in the page, or the middle of one of its widgets.
  place(kind, name) {
    const { pos, size } = tests.node(kind), { ds, canvas } = app.canvas, page = canvas.getBoundingClientRect();
    const [x, y] = name ? [size[0] / 2, tests.widget(kind, name).last_y + 10] : [60, -15];
    return [page.x + (pos[0] + x + ds.offset[0]) * ds.scale, page.y + (pos[1] + y + ds.offset[1]) * ds.scale];
  },

  // Where the nodes of these kinds and their titles are in the graph: left and top, right and bottom.
  bounds(kinds) {
    const nodes = app.graph.nodes.filter((node) => kinds.includes(node.type));
    const from = [0, 1].map((i) => Math.min(...nodes.map((node) => node.pos[i] - 30 * i)));
    return [from, [0, 1].map((i) => Math.max(...nodes.map((node) => node.pos[i] + node.size[i])))];
  },

  // Where every node is, with its title: left, top, right and bottom in the graph. In Nodes 2.0 it is an element.
  places: () =>
    app.graph.nodes.map((node) => {
      const element = document.querySelector(`[data-node-id="${node.id}"]`), { ds, canvas } = app.canvas;
      const name = `${node.id} ${node.title}`, [x, y] = node.pos, [width, height] = node.size;
      if (!element) return [name, [x, y - 30, x + width, y + (node.flags.collapsed ? 0 : height)]];
      const { left, top, right, bottom } = element.getBoundingClientRect(), page = canvas.getBoundingClientRect();
      const at = (pixels, from, i) => (pixels - from) / ds.scale - ds.offset[i];
      return [name, [at(left, page.x, 0), at(top, page.y, 1), at(right, page.x, 0), at(bottom, page.y, 1)]];
    }),

  // Where the frames of groups are, as places() has them.
  frames: () =>
    app.graph.groups.map(({ title, pos: [x, y], size: [width, height] }) => [title, [x, y, x + width, y + height]]),

  // Whether all nodes are elements of the page with their widgets, as in Nodes 2.0. What draws a widget comes when it is
  // first needed, beside the widget's handle.
  elements: () =>
    document.querySelectorAll("[data-node-id]").length >= app.graph.nodes.length &&
    [...document.querySelectorAll(".lg-node-widget")].every((widget) => widget.childElementCount > 1),

  // Texts that are not shown whole: on the canvas those that end in dots and titles wider than their frame, in Nodes 2.0
  // those of elements that hide what goes beyond them.
  cut() {
    const cut = [], { prototype } = CanvasRenderingContext2D, { fillText } = prototype;
    const frames = new Map(app.graph.groups.map((group) => [group.title, group.size[0]]));
    prototype.fillText = function (text) {
      if (/[…‥․]$/.test(text) || this.measureText(text).width > frames.get(text)) cut.push(text);
      return fillText.apply(this, arguments);
    };
    app.canvas.draw(true, true);
    prototype.fillText = fillText;
    const hides = (element) => element.scrollWidth > element.clientWidth && getComputedStyle(element).overflowX === "hidden";
    const elements = [...document.querySelectorAll("[data-node-id] *")].filter(hides);
    return [...cut, ...elements.map((element) => element.value ?? element.innerText).filter(Boolean)];
  },

  // How far the text of a graph's note goes beyond the note, in pixels of the graph.
  unread() {
    const parts = [...document.querySelectorAll(".tiptap > *")].filter((part) => part.clientHeight);
    const { ds, canvas } = app.canvas, note = tests.node("MarkdownNote");
    const end = Math.max(...parts.map((part) => part.getBoundingClientRect().bottom)) - canvas.getBoundingClientRect().y;
    return end / ds.scale - ds.offset[1] - note.pos[1] - note.size[1];
  },

  // Where nodes of these kinds are in the page, and a little more: above is the title of their group.
  area(kinds) {
    const [from, to] = tests.bounds(kinds), { scale, offset } = app.canvas.ds;
    const [x, y] = from.map((at, i) => (at + offset[i] - [15, 45][i]) * scale);
    return { x, y, width: (to[0] - from[0] + 30) * scale, height: (to[1] - from[1] + 60) * scale };
  },

  // The room for nodes with so many pixels free above, right, below and left of them, on a page this much larger.
  room([above, right, below, left], [wider, higher] = [0, 0]) {
    const { clientWidth, clientHeight } = app.canvas.canvas;
    return [clientWidth + wider - left - right, clientHeight + higher - above - below];
  },

  // The zoom at which nodes of these kinds are as large as they fit into it.
  fit(kinds, room) {
    const [from, to] = tests.bounds(kinds);
    return Math.min(...room.map((pixels, i) => pixels / (to[i] - from[i])));
  },

  // Show them there.
  lookAt(kinds, margin) {
    const [from, to] = tests.bounds(kinds), { ds } = app.canvas, room = tests.room(margin), [above, , , left] = margin;
    ds.scale = tests.fit(kinds, room);
    ds.offset = [left, above].map((edge, i) => (edge + room[i] / 2) / ds.scale - (from[i] + to[i]) / 2);
    app.canvas.draw(true, true); // at once: a click finds nodes where they were drawn last
  },

  // Queue the open graph, with this prompt's id in place of the host's answer, once what is to come before has.
  async queue(prompt, before = () => {}) {
    const { fetchApi } = app.api;
    app.api.fetchApi = async function (path, ...rest) {
      if (path !== "/prompt") return fetchApi.call(this, path, ...rest);
      await before();
      return new Response(JSON.stringify({ prompt_id: prompt, node_errors: {} }));
    };
    await app.queuePrompt(0);
    app.api.fetchApi = fetchApi;
  },

  // News of the host, [event, detail], with time for the page to deal with each.
  async tell(...news) {
    for (const [event, detail] of news) {
      app.api.dispatchCustomEvent(event, detail);
      await new Promise((resolve) => setTimeout(resolve));
    }
  },

  clicks: 0, // of the mouse, since it was set to 0

  // What nodes show at every news of a run, after the page has dealt with it.
  moments: [],
  record() {
    for (const kind of ["progress", "b_preview", "execution_success", "execution_error", "execution_interrupted"])
      app.api.addEventListener(kind, ({ detail }) => queueMicrotask(() => tests.moments.push(tests.moment(kind, detail))));
  },
  moment: (kind, detail) => ({
    kind,
    error: detail?.exception_message,
    progress: Object.fromEntries(app.graph.nodes.filter((node) => node.progress).map((n) => [n.type, n.progress])),
    previews: Object.keys(app.nodePreviewImages).map((id) => app.graph.getNodeById(id)?.type),
  }),
  ended: () => tests.moments.some((moment) => moment.kind.startsWith("execution")),

  // A run is about to start: what the page says by now is of earlier ones, and may take a while to fade.
  start(complaints) {
    tests.moments.length = 0;
    for (const complaint of document.querySelectorAll(complaints)) complaint.dataset.earlier = "";
  },
};
addEventListener("pointerdown", () => tests.clicks++, true);
