mod alu;
mod cpu;
mod emulate;
mod oracle;
mod vie;
