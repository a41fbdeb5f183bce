"""What passes stand on and is no pass: contract, stages, shapes, data flow, the modules and operators of a graph."""
