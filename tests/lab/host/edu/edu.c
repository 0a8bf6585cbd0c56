/*
 * A driver for QEMU's teaching device: MSI, and DMA to and fro, until it is
 * unloaded. Its counts are its parameters.
 */
#include <linux/completion.h>
#include <linux/dma-mapping.h>
#include <linux/interrupt.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/pci.h>

/* Registers. */
#define IRQ_STATUS 0x24
#define IRQ_RAISE 0x60
#define IRQ_ACK 0x64
#define DMA_FROM 0x80
#define DMA_TO 0x88
#define DMA_COUNT 0x90
#define DMA_COMMAND 0x98
#define START 1
#define TO_MEMORY 2
#define AND_INTERRUPT 4
/* Where DMA sees the device's 4 KiB; QEMU ends at a transfer that reaches their end. */
#define BUFFER 0x40000
#define LENGTH (4096 - 64)

/* Interrupts asked for, and come; transfers; bytes that were not as written. */
static unsigned long asked, came, transfers, wrong;
module_param(asked, ulong, 0444);
module_param(came, ulong, 0444);
module_param(transfers, ulong, 0444);
module_param(wrong, ulong, 0444);

static struct card {
	void __iomem *registers;
	u8 *memory;
	dma_addr_t at;
	struct task_struct *task;
	struct completion done;
} card;

static irqreturn_t on_interrupt(int irq, void *c)
{
	u32 status = readl(card.registers + IRQ_STATUS);

	if (!status)
		return IRQ_NONE;
	writel(status, card.registers + IRQ_ACK);
	came++;
	complete(&card.done);
	return IRQ_HANDLED;
}

/* Writes a register and waits for the interrupt that it asks for. */
static void ask(u32 reg, u32 value)
{
	reinit_completion(&card.done);
	asked++;
	writel(value, card.registers + reg);
	if (!wait_for_completion_timeout(&card.done, 30 * HZ))
		pr_err("edu: an interrupt is lost\n");
}

static void transfer(u64 from, u64 to, u32 command)
{
	writel(from, card.registers + DMA_FROM);
	writel(to, card.registers + DMA_TO);
	writel(LENGTH, card.registers + DMA_COUNT);
	ask(DMA_COMMAND, START | AND_INTERRUPT | command);
	transfers++;
}

static int work(void *unused)
{
	u8 round = 0;
	int i;

	while (!kthread_should_stop()) {
		for (i = 0; i < 100; i++)
			ask(IRQ_RAISE, 1);
		round++;
		for (i = 0; i < LENGTH; i++)
			card.memory[i] = i * 7 + i / 256 + round;
		transfer(card.at, BUFFER, 0);
		memset(card.memory, 0, LENGTH);
		transfer(BUFFER, card.at, TO_MEMORY);
		for (i = 0; i < LENGTH; i++)
			wrong += card.memory[i] != (u8)(i * 7 + i / 256 + round);
	}
	return 0;
}

static int probe(struct pci_dev *dev, const struct pci_device_id *id)
{
	int error = pcim_enable_device(dev);

	if (!error)
		error = dma_set_mask_and_coherent(&dev->dev, DMA_BIT_MASK(28));
	if (error)
		return error;
	pci_set_master(dev);
	init_completion(&card.done);
	card.registers = pcim_iomap(dev, 0, 0);
	card.memory = dmam_alloc_coherent(&dev->dev, 4096, &card.at, GFP_KERNEL);
	if (!card.registers || !card.memory)
		return -ENOMEM;
	error = pci_alloc_irq_vectors(dev, 1, 1, PCI_IRQ_MSI);
	if (error < 0)
		return error;
	error = request_irq(pci_irq_vector(dev, 0), on_interrupt, 0, "edu", &card);
	if (error)
		goto no_irq;
	card.task = kthread_run(work, NULL, "edu");
	if (!IS_ERR(card.task))
		return 0;
	error = PTR_ERR(card.task);
	free_irq(pci_irq_vector(dev, 0), &card);
no_irq:
	pci_free_irq_vectors(dev);
	return error;
}

static void remove(struct pci_dev *dev)
{
	kthread_stop(card.task);
	free_irq(pci_irq_vector(dev, 0), &card);
	pci_free_irq_vectors(dev);
}

static const struct pci_device_id ids[] = { { PCI_DEVICE(0x1234, 0x11e8) }, {} };
static struct pci_driver edu = {
	.name = "edu",
	.id_table = ids,
	.probe = probe,
	.remove = remove,
};
module_pci_driver(edu);
MODULE_DESCRIPTION("QEMU's edu, kept busy");
MODULE_LICENSE("Dual BSD/GPL");
