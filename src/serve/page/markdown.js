// Markdown as models write it, to nodes: headings, lists, tables, quotes, code, emphasis, links. HTML in it stays text.
//
// Every run of text knows where in the source it stands, so that a caller's `paint(text, at)` can colour it; without one it becomes a text node.
// A line is { text, at }: what is left of it within lists and quotes, and where that begins in the source.

const DEEPEST = 12;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+|$)/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +|$)/;
const DELIMITERS = /^ *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;

// Shows `source` in `container`. Top-level blocks that it shows already stay: a stream touches its last block only.
function showMarkdown(container, source, paint) {
  const blocks = parseBlocks(linesOf(source), 0);
  blocks.forEach((block, i) => {
    const first = block.lines[0], last = block.lines.at(-1);
    const key = `${paint ? "painted" : "plain"} ${first.at} ${source.slice(first.at, last.at + last.text.length)}`;
    const old = container.children[i];
    if (old?.markdown === key) return;
    const node = blockNode(block, paint, 0);
    node.markdown = key;
    if (old) old.replaceWith(node); else container.append(node);
  });
  while (container.children.length > blocks.length) container.lastChild.remove();
}

function linesOf(source) {
  let at = 0;
  return source.split("\n").map(text => {
    const line = { text, at };
    at += text.length + 1;
    return line;
  });
}

const rest = (line, from) => ({ text: line.text.slice(from), at: line.at + from });
const blank = line => !line.text.trim();
const indent = line => line.text.length - line.text.trimStart().length;
const tableAt = (lines, i) =>
  lines[i].text.includes("|") && i + 1 < lines.length && lines[i + 1].text.includes("-") && DELIMITERS.test(lines[i + 1].text);
const beginsBlock = ({ text }) => FENCE.test(text) || HEADING.test(text) || RULE.test(text) || QUOTE.test(text) || ITEM.test(text);

// Blocks { kind, lines, ... }: `lines` is all of it, as it stands there.
function parseBlocks(lines, depth) {
  const blocks = [];
  for (let i = 0; i < lines.length;) {
    if (blank(lines[i])) { i++; continue; }
    const block = depth < DEEPEST ? blockAt(lines, i, depth) : paragraphAt(lines, i);
    blocks.push(block);
    i += block.lines.length;
  }
  return blocks;
}

function blockAt(lines, i, depth) {
  const { text } = lines[i];
  const fence = FENCE.exec(text);
  if (fence) {
    const closes = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
    const end = endOf(lines, i + 1, line => closes.test(line.text));
    return { kind: "code", language: fence[2], body: lines.slice(i + 1, end), lines: lines.slice(i, end + 1) };
  }
  const heading = HEADING.exec(text);
  if (heading) return { kind: "heading", level: heading[1].length, body: [rest(lines[i], heading[0].length)], lines: [lines[i]] };
  if (RULE.test(text)) return { kind: "rule", lines: [lines[i]] };
  if (QUOTE.test(text)) {
    const own = lines.slice(i, endOf(lines, i, line => !QUOTE.test(line.text)));
    return { kind: "quote", children: parseBlocks(own.map(line => rest(line, QUOTE.exec(line.text)[0].length)), depth + 1), lines: own };
  }
  if (ITEM.test(text)) return listAt(lines, i, depth);
  if (tableAt(lines, i)) {
    const end = endOf(lines, i + 2, line => blank(line) || !line.text.includes("|"));
    return { kind: "table", lines: lines.slice(i, end) };
  }
  return paragraphAt(lines, i);
}

function endOf(lines, from, ends) {
  let i = from;
  while (i < lines.length && !ends(lines[i])) i++;
  return i;
}

function paragraphAt(lines, i) {
  const end = endOf(lines, i + 1, line => blank(line) || beginsBlock(line));
  return { kind: "paragraph", body: lines.slice(i, end), lines: lines.slice(i, end) };
}

function listAt(lines, from, depth) {
  const ordered = /\d/.test(ITEM.exec(lines[from].text)[2]);
  const items = [];
  let i = from;
  while (i < lines.length) {
    const marker = ITEM.exec(lines[i].text);
    if (!marker || /\d/.test(marker[2]) !== ordered || RULE.test(lines[i].text)) break;
    const width = marker[1].length + marker[2].length + Math.min(marker[3].length || 1, 4);
    const own = [rest(lines[i], Math.min(width, lines[i].text.length))];
    for (i++; i < lines.length; i++) {
      if (blank(lines[i])) {
        // What follows an empty line belongs to the item only if it is indented.
        const next = endOf(lines, i, line => !blank(line));
        if (next === lines.length || indent(lines[next]) < Math.min(width, 2)) break;
        own.push(lines[i]);
      } else if (indent(lines[i]) >= Math.min(width, 2)) {
        own.push(rest(lines[i], Math.min(indent(lines[i]), width)));
      } else if (beginsBlock(lines[i])) {
        break;
      } else {
        own.push(lines[i]);
      }
    }
    items.push(parseBlocks(own, depth + 1));
    const next = endOf(lines, i, line => !blank(line));
    if (next < lines.length && ITEM.test(lines[next].text)) i = next;
  }
  const start = ordered ? parseInt(ITEM.exec(lines[from].text)[2], 10) : null;
  return { kind: "list", ordered, start, items, lines: lines.slice(from, i) };
}

function blockNode(block, paint) {
  const blocks = children => children.map(child => blockNode(child, paint));
  switch (block.kind) {
    case "heading": return el(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.body, paint));
    case "rule": return el("hr");
    case "quote": return el("blockquote", {}, ...blocks(block.children));
    case "list": {
      // An item of one paragraph is not spaced as one.
      const item = children => el("li", {}, ...(children[0]?.kind === "paragraph" ? inline(children.shift().body, paint) : []), ...blocks(children));
      return el(block.ordered ? "ol" : "ul", { start: block.start }, ...block.items.map(item));
    }
    case "table": return tableNode(block.lines, paint);
    case "code": return codeNode(block, paint);
    default: return el("p", {}, ...inline(block.body, paint));
  }
}

function codeNode({ body, language }, paint) {
  const code = body.map(line => line.text).join("\n");
  const shown = paint ? body.flatMap(line => [...paint(line.text, line.at), "\n"]) : highlight(code, language);
  const button = iconButton("copy", "Copy the code", () => copy(code, button));
  return el("figure", { class: "code" }, el("figcaption", {}, language || "text", button), el("pre", { tabindex: "0" }, el("code", {}, ...shown)));
}

function tableNode([head, delimiters, ...body], paint) {
  const align = cellsOf(delimiters).map(({ text }) => /^:.*:$/.test(text) ? "center" : /:$/.test(text) ? "right" : null);
  const row = (line, tag) => el("tr", {}, ...align.map((side, i) => {
    const cell = cellsOf(line)[i];
    return el(tag, { class: side, scope: tag === "th" ? "col" : null }, ...(cell ? inline([cell], paint) : []));
  }));
  return el("div", { class: "table", tabindex: "0" },
    el("table", {}, el("thead", {}, row(head, "th")), el("tbody", {}, ...body.map(line => row(line, "td")))));
}

function cellsOf(line) {
  const cells = [];
  const begin = /^\s*\|?/.exec(line.text)[0].length, end = line.text.replace(/\|?\s*$/, "").length;
  for (let from = begin, i = begin; i <= end; i++) {
    if (i < end && (line.text[i] !== "|" || line.text[i - 1] === "\\")) continue;
    const text = line.text.slice(from, i);
    cells.push({ text: text.trim(), at: line.at + from + text.length - text.trimStart().length });
    from = i + 1;
  }
  return cells;
}

// Nodes of the text of lines, whose ends are line breaks.
function inline(lines, paint) {
  const text = lines.map(line => line.text).join("\n");
  const places = lines.flatMap(line => Array.from({ length: line.text.length + 1 }, (_, i) => line.at + i));
  const plain = (from, to) => paint ? paint(text.slice(from, to), places[from]) : [text.slice(from, to)];
  return span(text, 0, text.length, plain, 0);
}

const URL_AT = /https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]}*_]/y;
const LINK_END = /\]\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+["'(][^\n]*?["')])?\s*\)/y;
const MARKS = { "***": ["strong", "em"], "**": ["strong"], "__": ["strong"], "~~": ["del"], "*": ["em"], "_": ["em"] };

function span(text, begin, end, plain, depth) {
  const nodes = [];
  // Marks that close nowhere further on.
  const open = new Set();
  let from = begin;
  const flush = to => { if (to > from) nodes.push(...plain(from, to)); };
  const put = (at, next, ...made) => { flush(at); nodes.push(...made); from = next; return next; };
  for (let i = begin; i < end;) {
    const at = text[i];
    if (at === "\n") {
      const hard = text[i - 1] === "\\" ? 1 : 0;
      i = put(i - hard, i + 1, el("br"));
    } else if (at === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) {
      flush(i);
      from = i + 1;
      i += 2;
    } else if (at === "`") {
      const ticks = /`+/y;
      ticks.lastIndex = i;
      const fence = ticks.exec(text)[0];
      const close = open.has(fence) ? -1 : codeEnd(text, i + fence.length, end, fence);
      if (close < 0) { open.add(fence); i += fence.length; continue; }
      i = put(i, close + fence.length, el("code", {}, ...plain(i + fence.length, close)));
    } else if (at === "[" || (at === "!" && text[i + 1] === "[")) {
      const link = depth < DEEPEST && linkAt(text, at === "!" ? i + 2 : i + 1, end);
      if (!link) { i++; continue; }
      i = put(i, link.next, anchor(link.url, span(text, link.from, link.to, plain, depth + 1)));
    } else if (at === "h" && (i === 0 || !/\w/.test(text[i - 1]))) {
      URL_AT.lastIndex = i;
      const url = URL_AT.exec(text)?.[0];
      if (!url || i + url.length > end) { i++; continue; }
      // Angle brackets around it are no part of what is shown.
      const bracket = text[i - 1] === "<" && text[i + url.length] === ">" && i > from && i + url.length < end ? 1 : 0;
      i = put(i - bracket, i + url.length + bracket, anchor(url, plain(i, i + url.length)));
    } else if ("*_~".includes(at)) {
      const mark = Object.keys(MARKS).find(mark => text.startsWith(mark, i));
      if (!mark || depth >= DEEPEST || open.has(mark) || !opens(text, i, mark)) { i += mark?.length ?? 1; continue; }
      const close = closeOf(text, i, end, mark);
      if (close < 0) { open.add(mark); i += mark.length; continue; }
      const inner = span(text, i + mark.length, close, plain, depth + 1);
      i = put(i, close + mark.length, MARKS[mark].reduceRight((inside, tag) => [el(tag, {}, ...inside)], inner)[0]);
    } else {
      i++;
    }
  }
  flush(end);
  return nodes;
}

function codeEnd(text, from, end, fence) {
  for (let i = text.indexOf(fence, from); i >= 0 && i < end; i = text.indexOf(fence, i)) {
    let after = i;
    while (text[after] === "`") after++;
    if (after - i === fence.length) return i;
    i = after;
  }
  return -1;
}

// A mark opens before what is no space and closes after it; an underscore does neither within a word.
const isWord = c => c !== undefined && /[\p{L}\p{N}_]/u.test(c);

function opens(text, i, mark) {
  const first = text[i + mark.length];
  return first !== undefined && !/\s/.test(first) && !(mark[0] === "_" && isWord(text[i - 1]));
}

function closeOf(text, i, end, mark) {
  for (let at = text.indexOf(mark, i + mark.length + 1); at >= 0 && at + mark.length <= end; at = text.indexOf(mark, at + 1)) {
    const next = text[at + mark.length];
    const single = mark.length === 1 && ((at + 1 < end && next === mark) || text[at - 1] === mark);
    if (/\s/.test(text[at - 1]) || text[at - 1] === "\\" || single || (mark[0] === "_" && isWord(next))) continue;
    // `**a *b***`: the longer run belongs to the inner mark first.
    return mark.length === 2 && next === mark[0] && text[at + mark.length + 1] !== mark[0] ? at + 1 : at;
  }
  return -1;
}

function linkAt(text, from, end) {
  let depth = 0;
  for (let i = from; i < end && i < from + 500; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === "[") depth++;
    else if (text[i] === "]" && depth-- === 0) {
      LINK_END.lastIndex = i;
      const match = LINK_END.exec(text);
      return match && i + match[0].length <= end ? { url: match[1], from, to: i, next: i + match[0].length } : null;
    }
  }
  return null;
}

// Only what leads to a page or a mail; anything else stays text.
function anchor(url, children) {
  const parsed = URL.canParse(url) ? new URL(url) : null;
  if (!parsed || !["http:", "https:", "mailto:"].includes(parsed.protocol)) return el("span", { title: url }, ...children);
  return el("a", { href: parsed.href, target: "_blank", rel: "noopener noreferrer", title: parsed.href }, ...children);
}
