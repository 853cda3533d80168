/** Colours for code, by highlight.js; it and each language are loaded with the first code that needs them. */

import { whenIdle } from "./idle.js";

const VENDOR = "../../../vendor/highlight/";
const MAX_CODE = 50_000; // characters; more takes so long that the page would be felt to hang (about 1 ms per 1,000)

// Of the languages that highlight.js knows; what is not here stays plain. After "=": other names for it.
const LANGUAGES = `bash=sh,zsh c=h clojure=clj cmake cpp=c++,cc,hpp csharp=cs,c# css dart delphi=pascal diff=patch
dockerfile=docker elixir=ex,exs elm erlang=erl fortran=f90 fsharp=f#,fs glsl go=golang gradle graphql=gql groovy
haskell=hs http ini=toml,conf java javascript=js,jsx,mjs,cjs,node json=jsonc,json5 julia=jl kotlin=kt latex=tex less
lisp lua makefile=make markdown=md mathematica matlab nginx nim nix objectivec=objc,objective-c ocaml=ml perl=pl php
pgsql=postgresql plaintext powershell=ps1,pwsh prolog properties protobuf=proto python=py,python3 r ruby=rb rust=rs
scala scheme scss=sass shell=console,shellsession sql=mysql,sqlite swift tcl typescript=ts,tsx vbnet=vb verilog=v,sv
vhdl vim wasm wren x86asm=asm,nasm xml=html,xhtml,svg,vue yaml=yml`;
const FILES = new Map();
for (const entry of LANGUAGES.split(/\s+/)) {
  const [file, others = ""] = entry.split("=");
  for (const name of [file, ...others.split(",")]) FILES.set(name, file);
}

const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#x27;": "'" };
const loading = new Map();

/** Colour the code in an element, some time soon, unless its text changes meanwhile. */
export async function highlight(element, language, changed) {
  const file = FILES.get(language.toLowerCase());
  const code = element.textContent;
  if (!file || file === "plaintext" || code.length > MAX_CODE) return;
  try {
    const highlighter = await load("core");
    await load(`languages/${file}`, (grammar) => highlighter.registerLanguage(file, grammar));
    whenIdle(() => {
      if (element.textContent !== code) return;
      element.replaceChildren(fragment(highlighter.highlight(code, { language: file, ignoreIllegals: true }).value));
    }, changed);
  } catch (error) {
    console.warn(`${language} stays plain`, error);
  }
}

function load(name, use = (module) => module) {
  if (!loading.has(name)) loading.set(name, import(`${VENDOR}${name}.min.js`).then((module) => use(module.default)));
  return loading.get(name);
}

/** Build what highlight.js wrote: spans with classes, and text. Not by innerHTML, so that nothing else can come of it. */
function fragment(html) {
  const stack = [document.createDocumentFragment()];
  for (const part of html.split(/(<span class="[^"<>]*">|<\/span>)/)) {
    const className = part.match(/^<span class="(.*)">$/)?.[1];
    if (className !== undefined) {
      const span = Object.assign(document.createElement("span"), { className });
      stack.at(-1).append(span);
      stack.push(span);
    } else if (part === "</span>") {
      stack.pop();
    } else if (part) {
      stack.at(-1).append(part.replace(/&(?:amp|lt|gt|quot|#x27);/g, (entity) => ENTITIES[entity]));
    }
  }
  return stack[0];
}
