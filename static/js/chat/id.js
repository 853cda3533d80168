/** A new random id. Not crypto.randomUUID, which pages on http: have only on the machine itself. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
