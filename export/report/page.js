const list = document.getElementById("products"), orders = document.querySelector(".orders");
orders.hidden = false;
orders.addEventListener("click", (event) => {
  const order = event.target.dataset.order;
  if (order === undefined) return;
  const rank = (row) => Number(row.dataset.ranks.trim().split(" ")[order]);
  [...list.children].sort((a, b) => rank(a) - rank(b)).forEach((row) => list.append(row));
  orders.querySelectorAll("button").forEach((button) => button.classList.toggle("on", button === event.target));
});
