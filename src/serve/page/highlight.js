// Light colours for code: comments, strings, numbers, keywords, calls. One scan, no grammar.

const KEYWORDS = new Set((
  "abstract and as async await begin bool boolean break case catch char class const constexpr continue crate def default defer delete do double " +
  "elif else elsif end enum except export extends extern false False final finally float fn for foreach from func function go goto if impl implements " +
  "import in include inline instanceof int interface is let long loop match mod module move mut namespace new nil None not null operator or package " +
  "pass private protected pub public raise ref return select self Self short signed sizeof static struct super switch template then this throw trait " +
  "true True try type typedef typeof typename undefined union unless unsafe unsigned until use using val var virtual void volatile when where while " +
  "with yield SELECT FROM WHERE INSERT INTO VALUES UPDATE SET DELETE CREATE TABLE JOIN LEFT RIGHT INNER ON GROUP BY ORDER HAVING LIMIT AS AND OR NOT " +
  "NULL fi done esac echo local"
).split(" "));
const HASH = /^(py|python|sh|bash|zsh|shell|console|rb|ruby|yaml|yml|toml|r|perl|pl|make|makefile|dockerfile|ini|conf|elixir|julia)$/;
const DASHES = /^(sql|lua|haskell|hs|ada)$/;
const PLAIN = /^(|text|txt|plain|plaintext|output|log|md|markdown)$/;

const STRING = String.raw`"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|` + "`(?:\\\\.|[^`\\\\])*`";
const REST = String.raw`(?<number>\b(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*\.?\d*(?:[eE][+-]?\d+)?)\w*)|(?<word>[A-Za-z_]\w*)`;
const scanner = comment => new RegExp(`(?<comment>${comment})|(?<string>${STRING})|${REST}`, "g");
const SCANNERS = {
  hash: scanner(String.raw`#.*|"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)`),
  dashes: scanner(String.raw`--.*|/\*[\s\S]*?(?:\*/|$)`),
  slashes: scanner(String.raw`//.*|/\*[\s\S]*?(?:\*/|$)|<!--[\s\S]*?(?:-->|$)`),
};

// Nodes that show `code`, in a language as it stands after the fence.
function highlight(code, language) {
  const name = language.toLowerCase();
  if (PLAIN.test(name)) return [code];
  const scan = SCANNERS[HASH.test(name) ? "hash" : DASHES.test(name) ? "dashes" : "slashes"];
  const nodes = [];
  let end = 0;
  for (const match of code.matchAll(scan)) {
    const kind = kindOf(match, code);
    if (!kind) continue;
    nodes.push(code.slice(end, match.index), el("span", { class: `hl-${kind}` }, match[0]));
    end = match.index + match[0].length;
  }
  nodes.push(code.slice(end));
  return nodes;
}

function kindOf({ 0: text, index, groups }, code) {
  if (groups.comment) return "comment";
  if (groups.string) return "string";
  if (groups.number) return "number";
  if (KEYWORDS.has(text)) return "keyword";
  return code[index + text.length] === "(" ? "call" : null;
}
