// The ledger's filter: without this script the table is whole and the form stays hidden.
document.addEventListener("DOMContentLoaded", () => {
  const form = document.querySelector(".kexue-filter");
  if (!form) return;
  const bodies = [...document.querySelectorAll(".kexue-book tbody")];
  const show = () => {
    const { chapter, kind } = form.elements;
    let checks = 0, rivals = 0;
    for (const body of bodies) {
      let here = 0;
      for (const row of body.querySelectorAll("tr[data-kind]")) {
        const fits = (!chapter.value || body.dataset.chapter === chapter.value) && (!kind.value || row.dataset.kind === kind.value);
        row.hidden = !fits;
        if (fits) { here += 1; rivals += Number(row.querySelector("[data-rivals]").dataset.rivals); }
      }
      body.hidden = !here;
      checks += here;
    }
    form.querySelector("output").textContent = `${checks} checks, ${rivals} rivals rejected`;
  };
  form.hidden = false;
  form.addEventListener("change", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
});
