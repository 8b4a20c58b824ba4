// Draws the charts into the elements that carry their names.
const { config, specs } = JSON.parse(document.getElementById("charts").textContent);
const options = {
  config,
  actions: false,
  ast: true, // expressions are interpreted: the page's policy forbids to compile them
  defaultStyle: false,
  renderer: "svg",
  tooltip: { disableDefaultStyle: true },
};
const drawn = Object.entries(specs).map(([name, spec]) => vegaEmbed(document.getElementById(`chart-${name}`), spec, options));
Promise.all(drawn).then(() => {
  document.documentElement.dataset.charts = "drawn";
});
