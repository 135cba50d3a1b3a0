"use strict";
(() => {
  const section = document.getElementById("viewer");
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const canvas = section.querySelector("canvas");
  const say = (text) => { section.querySelector("[data-say]").textContent = text; };
  const chosen = (name) => section.querySelector(`input[name=${name}]:checked`).value;
  const sliders = [...section.querySelectorAll("input[data-axis]")];
  const opacity = section.querySelector("input[data-opacity]");
  const mosaic = section.querySelector("select");
  const legend = section.querySelector("[data-legend]");
  let nv = null;
  let loaded = null;

  const place = () => { // the sliders follow the crosshair
    const voxel = nv.frac2vox(nv.scene.crosshairPos);
    sliders.forEach((slider) => {
      slider.value = Math.round(voxel[slider.dataset.axis]);
      slider.nextElementSibling.textContent = slider.value;
    });
    const values = nv.volumes.map((volume) => volume.getValue(...[...voxel].map(Math.round)));
    const names = data.cases[loaded].labels.labels;
    const told = data.cases[loaded].maps.slice(0, -1).map((map, number) => {
      const label = values[number + 1];
      return `${map.name}: ${label ? names[label] || label : "background"}`;
    });
    say(`voxel ${[...voxel].map(Math.round).join(", ")}; intensity ${Number(values[0].toPrecision(4))}; ${told.join("; ")}`);
  };
  const explain = (table) => { // colours of the label map that is shown, where there are few
    const few = table.labels.length > 1 && table.labels.length <= 25;
    legend.replaceChildren(...(few ? table.labels.slice(1) : []).map((name, place) => {
      const item = document.createElement("li");
      const key = document.createElement("span");
      key.className = "key";
      key.style.background = `rgb(${table.R[place + 1]} ${table.G[place + 1]} ${table.B[place + 1]})`;
      item.append(key, name);
      return item;
    }));
  };
  const choose = () => { // one label map at a time
    const wanted = chosen("map");
    const one = data.cases[loaded];
    explain(wanted === "differences" ? one.differences : wanted ? one.labels : { labels: [] });
    one.maps.forEach((map, number) => {
      nv.setOpacity(number + 1, map.name === wanted ? Number(opacity.value) : 0);
    });
  };
  const load = async (number) => {
    say("loading");
    const one = data.cases[number];
    while (nv.volumes.length) nv.removeVolume(nv.volumes[nv.volumes.length - 1]);
    const read = (name, base64) => niivue.NVImage.loadFromBase64({ base64, name: `${name}.nii.gz`, colormap: "gray" });
    nv.addVolume(await read("image", one.image));
    for (const map of one.maps) {
      const volume = await read(map.name, map.data);
      volume.setColormapLabel(map.name === "differences" ? one.differences : one.labels);
      volume.opacity = 0;
      nv.addVolume(volume);
    }
    loaded = number;
    sliders.forEach((slider) => { slider.max = nv.volumes[0].dimsRAS[Number(slider.dataset.axis) + 1] - 1; });
    section.querySelector("[data-note]").textContent = one.note;
    nv.scene.crosshairPos = nv.vox2frac(one.centre);
    choose();
    nv.updateGLVolume();
    place();
    section.dataset.ready = String(number);
  };
  const start = async () => {
    if (!document.createElement("canvas").getContext("webgl2")) {
      say("This browser has no WebGL2, which the viewer needs. The overlays above show the same cases.");
      return;
    }
    nv = new niivue.Niivue({
      backColor: [0, 0, 0, 1], crosshairColor: [1, 1, 0, 0.7], crosshairWidth: 0.25, dragAndDropEnabled: false,
      loadingText: "", multiplanarShowRender: 0, multiplanarEqualSize: true, logLevel: "error",
    });
    await nv.attachToCanvas(canvas);
    nv.setInterpolation(true);
    nv.setSliceType(nv.sliceTypeMultiplanar);
    nv.onLocationChange = () => { if (loaded !== null) place(); };
    await load(Number(chosen("case")));
    const again = (name, act) => section.querySelectorAll(`input[name=${name}]`).forEach((input) => {
      input.addEventListener("change", () => Promise.resolve(act()).catch(fail));
    });
    again("case", () => load(Number(chosen("case"))));
    again("map", choose);
    opacity.addEventListener("input", choose);
    mosaic.addEventListener("change", () => nv.setSliceType(nv[mosaic.value]));
    sliders.forEach((slider) => slider.addEventListener("input", () => {
      nv.scene.crosshairPos = nv.vox2frac(sliders.map((one) => Number(one.value)));
      nv.drawScene();
      place();
    }));
  };
  const fail = (error) => { say(`The viewer failed: ${error.message}`); section.dataset.failed = error.message; };
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    start().catch(fail);
  }, { rootMargin: "200px" }).observe(section);
})();
