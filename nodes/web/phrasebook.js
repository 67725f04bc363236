// English texts in another language, by the templates of words.json. A template's fields are called after what they hold:
// a digit is a number, the name of a group of phrases one of these phrases, `word` text without a space, `sentence` a
// sentence or any other text, and every other name any text. A digit after a name tells two of a kind apart.
const FIELD = /\{(\w+)\}/g;
const NUMBER = String.raw`-?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|inf|nan)`;
const ANY = "{text}"; // in a group: other texts besides its phrases
const LINE = /^(⚠ )?(.*)$/; // the mark is WARNING of sentences.js
const ERROR = /^([\w.]+: )(.*)$/; // before a sentence that is no ValueError's, as text.js writes it

const kindOf = (field) => field.replace(/(?<=\D)\d+$/, "");
const fieldsOf = (template) => [...template.matchAll(FIELD)].map(([, field]) => field);
const letters = (template) => template.replace(FIELD, "").length;
const escaped = (text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, String.raw`\$&`);

export class Phrasebook {
  // table: of words.json. language: a key of its rows.
  constructor({ phrases, sentences, choices, notes, titles }, language) {
    this.language = language;
    this.choices = choices;
    this.groups = phrases;
    this.patterns = {}; // of groups, by their names
    this.phrases = Object.fromEntries(Object.entries(phrases).map(([group, rows]) => [group, this.compiled(rows)]));
    this.sentences = this.compiled(sentences);
    this.notes = this.compiled(notes);
    this.titles = this.compiled(titles);
  }

  // Templates as regular expressions with a group for each field, those with the most letters of their own first.
  compiled(rows) {
    const byLetters = Object.entries(rows).sort(([a], [b]) => letters(b) - letters(a));
    return byLetters.map(([template, row]) => ({
      pattern: new RegExp(`^${this.pattern(template, (field) => `(${this.fieldPattern(field)})`)}$`),
      fields: fieldsOf(template),
      translation: row[this.language],
    }));
  }

  pattern(template, fieldPattern) {
    const parts = template.split(FIELD); // text and names of fields in turn
    return parts.map((part, i) => (i % 2 ? fieldPattern(part) : escaped(part))).join("");
  }

  fieldPattern(field) {
    const kind = kindOf(field);
    if (/^\d+$/.test(kind)) return NUMBER;
    if (kind === "word") return String.raw`\S+?`;
    if (!(kind in this.groups) || ANY in this.groups[kind]) return ".*?";
    this.patterns[kind] ??= Object.keys(this.groups[kind])
      .sort((a, b) => letters(b) - letters(a))
      .map((template) => this.pattern(template, (inner) => `(?:${this.fieldPattern(inner)})`))
      .join("|");
    return this.patterns[kind];
  }

  // The translation of a text by the first of these templates that it has the form of; null where there is none.
  translated(text, rows) {
    for (const { pattern, fields, translation } of rows) {
      const match = pattern.exec(text);
      if (match) return translation.replace(FIELD, (_, field) => this.part(field, match[1 + fields.indexOf(field)]));
    }
    return null;
  }

  part(field, text) {
    const kind = kindOf(field);
    if (kind === "sentence") return this.translated(text, this.sentences) ?? text;
    return (kind in this.phrases ? this.translated(text, this.phrases[kind]) : null) ?? text;
  }

  // A line on a node, with its mark and an error's name as they are; one of another's is left as it is.
  line(text) {
    const [, mark = "", rest] = LINE.exec(text);
    const [, error = "", sentence = rest] = ERROR.exec(rest) ?? [];
    const whole = this.translated(rest, this.sentences);
    return mark + (whole ?? error + (this.translated(sentence, this.sentences) ?? sentence));
  }

  // A note of a template; null for a text that has a line of another's.
  note(text) {
    const lines = text.split("\n").map((line) => line && this.translated(line, this.notes));
    return lines.includes(null) ? null : lines.join("\n");
  }

  // A title of a template's node or group; null for another's.
  title(text) {
    return this.translated(text, this.titles);
  }

  // What a widget shows for one of its values: the value beside it, since tooltips and sentences call it by that.
  choice(value) {
    const row = this.choices[value];
    return row ? `${row[this.language]} (${value})` : value;
  }
}
