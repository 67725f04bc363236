// The choices of our widgets, and the notes and titles of our templates, shown in the page's language (words.js). Graphs
// keep the English: a choice is a value, and notes and titles are saved as they were loaded unless somebody has changed
// them.
import { app } from "../../scripts/app.js";
import { isOurs } from "./sentences.js";
import { choiceInWords, language, noteInWords, onLanguage, titleInWords } from "./words.js";

const NOTES = ["MarkdownNote", "Note"];
const TITLE = {
  inWords: titleInWords,
  read: ({ title }) => title,
  write: (owner, text) => void (owner.title = text),
  save: (data, text) => void (data.title = text),
};
const NOTE = {
  inWords: noteInWords,
  read: ({ widgets }) => widgets?.[0]?.value,
  write: ({ widgets: [widget] }, text) => void (widget.value = text),
  save: ({ widgets_values: values }, text) => void (values && (values[0] = text)),
};
const shownTexts = new WeakMap(); // node or group -> its texts that are shown in other words: NOTE or TITLE -> [English, shown]

function labelChoices(node) {
  for (const { name, options } of node.widgets ?? []) {
    if (name === "lora" || !Array.isArray(options?.values)) continue;
    if (language() === "en") delete options.getOptionLabel;
    else options.getOptionLabel = (value) => choiceInWords(value ?? "");
  }
}

function showText(owner, part) {
  const text = part.read(owner);
  if (typeof text !== "string") return;
  const [before, shownBefore] = shownTexts.get(owner)?.get(part) ?? [];
  const english = text === shownBefore ? before : text;
  const shown = part.inWords(english) ?? english;
  if (shown === text) return;
  if (!shownTexts.has(owner)) keepEnglish(owner);
  shownTexts.get(owner).set(part, [english, shown]);
  part.write(owner, shown);
}

function keepEnglish(owner) {
  const texts = new Map();
  const { serialize } = owner;
  shownTexts.set(owner, texts);
  owner.serialize = function () {
    const data = serialize.apply(this, arguments);
    for (const [part, [english, shown]] of texts) if (part.read(owner) === shown) part.save(data, english);
    return data;
  };
}

// Titles are everybody's words: those of graphs without a node of ours stay.
function showAll() {
  const { nodes, groups } = app.rootGraph ?? app.graph;
  for (const node of nodes.filter(isOurs)) labelChoices(node);
  for (const node of nodes.filter(({ type }) => NOTES.includes(type))) showText(node, NOTE);
  if (nodes.some(isOurs)) for (const owner of [...nodes, ...groups]) showText(owner, TITLE);
}

app.registerExtension({
  name: "phased-consistency.labels",
  nodeCreated(node) {
    if (isOurs(node)) labelChoices(node);
  },
  afterConfigureGraph: showAll,
  setup() {
    onLanguage(() => (app.rootGraph ?? app.graph) && showAll());
  },
});
