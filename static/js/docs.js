/** Shows the OpenAPI document with Swagger UI, which templates/docs.html loads. */

const element = document.getElementById("swagger");

/** Swagger UI names only its list of operations; this is for those who go from landmark to landmark. */
function nameLandmarks() {
  for (const [part, label] of Object.entries({ ".information-container": "About", ".scheme-container": "API key" })) {
    const node = element.querySelector(part);
    if (node) Object.assign(node, { role: "region", ariaLabel: label });
  }
}

// Deep links would be links within buttons, which not every keyboard reaches.
window.SwaggerUIBundle({
  url: element.dataset.document,
  domNode: element,
  deepLinking: false,
  validatorUrl: null,
  onComplete: nameLandmarks,
});
