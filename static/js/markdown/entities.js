/** The character references of HTML. */

// The names that texts use of the 2,000 that HTML knows; the last character is what the name stands for.
const NAMES = `amp& lt< gt> quot" apos' nbsp\u00a0 ensp\u2002 emsp\u2003 thinsp\u2009 shy\u00ad zwj\u200d zwnj\u200c copy© reg® trade™
hellip… mdash— ndash– lsquo‘ rsquo’ ldquo“ rdquo” laquo« raquo» bull• middot· sect§ para¶ deg° microµ euro€ pound£ yen¥ cent¢
times× divide÷ plusmn± minus− ne≠ le≤ ge≥ asymp≈ equiv≡ infin∞ sum∑ prod∏ int∫ radic√ part∂ nabla∇ isin∈ cap∩ cup∪ sub⊂ sup⊃
forall∀ exist∃ and∧ or∨ not¬ larr← uarr↑ rarr→ darr↓ harr↔ rArr⇒ hArr⇔ frac12½ frac14¼ frac34¾ sup1¹ sup2² sup3³ check✓
alphaα betaβ gammaγ deltaδ epsilonε thetaθ lambdaλ muμ piπ rhoρ sigmaσ tauτ phiφ omegaω DeltaΔ SigmaΣ OmegaΩ`;
const ENTITIES = new Map(NAMES.split(/[ \n]+/).map((entry) => [entry.slice(0, -1), entry.at(-1)]));

/** Replace character references; those that are not known stay. */
export function decode(text) {
  if (!text.includes("&")) return text;
  return text.replace(/&(?:#(\d{1,7})|#[xX]([\da-fA-F]{1,6})|(\w+));/g, (reference, decimal, hexadecimal, name) => {
    if (name) return ENTITIES.get(name) ?? reference;
    const code = decimal ? Number(decimal) : Number.parseInt(hexadecimal, 16);
    return code && code <= 0x10ffff ? String.fromCodePoint(code) : "\ufffd";
  });
}
