// The choices of our widgets and the notes of our templates, shown in the page's language (words.js). Graphs keep the
// English: a choice is a value, and a note is saved as it was loaded unless somebody has written in it.
import { app } from "../../scripts/app.js";
import { isOurs } from "./sentences.js";
import { choiceInWords, language, noteInWords, onLanguage } from "./words.js";

const NOTES = ["MarkdownNote", "Note"];
const notes = new WeakMap(); // node -> { english, shown }

function labelChoices(node) {
  for (const { name, options } of node.widgets ?? []) {
    if (name === "lora" || !Array.isArray(options?.values)) continue;
    if (language() === "en") delete options.getOptionLabel;
    else options.getOptionLabel = (value) => choiceInWords(value ?? "");
  }
}

function showNote(node) {
  const [widget] = node.widgets ?? [];
  if (typeof widget?.value !== "string") return;
  const before = notes.get(node);
  const english = widget.value === before?.shown ? before.english : widget.value;
  const shown = noteInWords(english);
  if (!before && shown === null) return;
  if (!before) keepEnglish(node, widget);
  notes.set(node, { english, shown: shown ?? english });
  widget.value = shown ?? english;
}

function keepEnglish(node, widget) {
  const { onSerialize } = node;
  node.onSerialize = function (data) {
    const { english, shown } = notes.get(node);
    if (widget.value === shown && data.widgets_values) data.widgets_values[0] = english;
    return onSerialize?.apply(this, arguments);
  };
}

function show(node) {
  if (isOurs(node)) labelChoices(node);
  if (NOTES.includes(node.type)) showNote(node);
}

app.registerExtension({
  name: "phased-consistency.labels",
  nodeCreated(node) {
    if (isOurs(node)) labelChoices(node);
  },
  loadedGraphNode: show,
  setup() {
    onLanguage(() => (app.rootGraph ?? app.graph)?.nodes.forEach(show));
  },
});
