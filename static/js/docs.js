/** Shows the OpenAPI document with Swagger UI, which templates/docs.html loads. */

const element = document.getElementById("swagger");

window.SwaggerUIBundle({ url: element.dataset.document, domNode: element, deepLinking: true, validatorUrl: null });
